"""What a terminal shows of a run, and what it shows elsewhere."""

import io
import re
import sys
import time

import pytest

from sparseformer_jax.training import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def make_terminal(monkeypatch):
    """A function that makes stderr a terminal; called in the test, as pytest sets stderr anew."""

    def make():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "SECONDS", 0.1)
        return sys.stderr

    return make


def test_the_bar_moves_while_it_compiles(make_terminal):
    terminal = make_terminal()
    shown = progress.Progress(0, 10)
    with shown.doing("compiling"):
        time.sleep(1.3)
    shown.close()
    drawn = terminal.getvalue().split("\r")
    seconds = {re.search(r"00:(\d\d)", bar)[1] for bar in drawn if bar.startswith("compiling")}
    assert {"00", "01"} <= seconds, drawn
    assert not drawn[-1].startswith("compiling")


def test_lines_stay_above_the_bar(make_terminal, capsys):
    terminal = make_terminal()
    shown = progress.Progress(4, 10)
    for step in (5, 6):
        shown.advance(step)
        shown.numbers({"loss": f"{step / 2}"})
        shown.line(f"step {step}")
    shown.close()
    assert capsys.readouterr().out == "step 5\nstep 6\n"
    last = terminal.getvalue().split("\r")[-1]
    assert "6/10" in last
    assert "loss=3.0" in last


def test_without_a_terminal_there_are_lines_alone(capsys):
    shown = progress.Progress(0, 10)
    with shown.doing("compiling"):
        shown.advance(1)
        shown.numbers({"loss": "2"})
        shown.line("step 1")
    shown.close()
    assert capsys.readouterr() == ("step 1\n", "")
