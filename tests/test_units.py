"""Numbers are shown with their prefix."""

import pytest

from sparseformer_jax import units


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 MiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2.0 TiB"), (2**75, "33,554,432.0 PiB")],
)
def test_bytes_are_shown_with_their_unit(number, text):
    assert units.size(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 "), (999, "999 "), (1234567, "1.23 M"), (2e18, "2e+03 P")]
)
def test_counts_are_shown_with_their_prefix(number, text):
    assert units.count(number) == text
