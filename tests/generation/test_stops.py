"""Text ends before what stops it, however it is cut into pieces."""

import itertools
import re

import pytest

from sparseformer_jax.generation.stops import StopText


def passed(pieces, stops):
    """What passes of pieces, one by one, until a string is complete, and whether it is."""
    stop, found = StopText(stops), []
    for piece in pieces:
        found.append(stop.push(piece))
        if stop.is_complete:
            return found, True
    return [*found, stop.rest()], False


def test_what_may_be_a_start_is_held_back():
    assert passed("a-b--c", ["--"]) == (["a", "", "-b", "", ""], True)
    assert passed(["ab", "a", "x"], ["aba!", "bax"]) == (["", "", "a"], True)
    assert passed(["ab", "a"], ["aba!"]) == (["", "", "aba"], False)
    assert passed(["ab", "a"], []) == (["ab", "a", ""], False)


@pytest.mark.parametrize(
    "stops", [["ab"], ["aab", "ba"], ["aba", "bb"], ["b", "aab"], ["bab", "aabb"]]
)
def test_nothing_depends_on_how_the_text_is_cut(stops):
    """For all short texts: it ends where the first string is complete, before its longest match."""
    for text in map("".join, itertools.product("ab", repeat=6)):
        ends = [end for end in range(7) if text[:end].endswith(tuple(stops))]
        expected = text
        if ends:
            expected = min((text[: ends[0]].removesuffix(stop) for stop in stops), key=len)
        for size in (1, 2, 3, 6):
            found, ended = passed(re.findall("." * size, text), stops)
            assert ("".join(found), ended) == (expected, bool(ends)), (text, size)
