"""How far reading, hashing and tokenising are, in bytes."""

from tqdm import tqdm


def byte_bar(title: str, total: int) -> tqdm:
    """Returns a bar of `total` bytes, which a terminal shows after three seconds."""
    # `disable=None`: only on a terminal.
    options = {"unit": "B", "unit_scale": True, "delay": 3, "disable": None, "leave": False}
    return tqdm(desc=title, total=total, **options)
