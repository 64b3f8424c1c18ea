"""Numbers for a person: with a prefix and three digits."""

import math


def count(number: float | int) -> str:
    """Returns a number with its decimal prefix: 1234567 -> "1.23 M"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = min(int(math.log10(max(number, 1)) // 3), len(prefixes) - 1)
    return f"{number / 1000**power:.3g} {prefixes[power]}"


def size(number: int) -> str:
    """Returns a number of bytes, in MiB or more: 3 * 2**20 -> "3.0 MiB"."""
    units = ["MiB", "GiB", "TiB", "PiB"]
    power = max(2, min(5, int(math.log2(max(number, 1)) // 10)))
    return f"{number / 1024**power:,.1f} {units[power - 2]}"
