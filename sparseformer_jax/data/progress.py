"""How far reading, hashing and tokenising are, in bytes."""

from tqdm import tqdm

_DELAY = 3  # seconds: what takes less shows nothing


def byte_bar(title: str, total: int) -> tqdm:
    """Returns a bar of `total` bytes, which a terminal shows if it takes some seconds."""
    # `disable=None`: only on a terminal.
    options = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
    return tqdm(desc=title, total=total, delay=_DELAY, **options)
