"""The picture of a run holds its numbers, and its absence is told once."""

import json

import pytest

from sparseformer_jax import cli
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def workdir(tmp_path):
    records = [
        {"step": 1, "train/loss": 5.5, "train/learning_rate": 1e-3},
        {
            "step": 10,
            "train/loss": 3.5,
            "train/learning_rate": 3e-3,
            "train/tokens_per_second": 9.0,
        },
        {"step": 10, "eval/loss": 4.0, "eval/perplexity": None},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / plots.METRICS_FILE).write_text(text + '{"step": 20, "tra')
    return tmp_path


def test_the_numbers_are_those_of_the_run_without_a_line_that_is_being_written(workdir):
    assert plots.read(workdir) == {
        "train/loss": ([1, 10], [5.5, 3.5]),
        "train/learning_rate": ([1, 10], [1e-3, 3e-3]),
        "train/tokens_per_second": ([10], [9.0]),
        "eval/loss": ([10], [4.0]),
    }


def test_every_panel_shows_its_numbers(workdir):
    loss, rate, speed = plots.figure(plots.read(workdir), "run").axes
    assert [line.get_ydata().tolist() for line in loss.lines] == [[5.5, 3.5], [4.0]]
    assert [text.get_text() for text in loss.get_legend().texts] == ["training", "evaluation"]
    assert rate.lines[0].get_ydata().tolist() == [1e-3, 3e-3]
    assert speed.lines[0].get_ydata().tolist() == [9.0]
    labels = [panel.get_ylabel() for panel in (loss, rate, speed)]
    assert labels == ["loss (nats per token)", "learning rate", "tokens / s"]


def test_the_command_draws_into_the_workdir_or_elsewhere(workdir, capsys):
    cli.plot(["plots", f"--workdir={workdir}"])
    elsewhere = workdir / "a.png"
    cli.plot(["plots", f"--workdir={workdir}", f"--output={elsewhere}"])
    assert capsys.readouterr().out.split() == [str(workdir / "loss.png"), str(elsewhere)]
    for file in (workdir / "loss.png", elsewhere):
        assert file.read_bytes().startswith(PNG)
    assert not list(workdir.glob(".*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --workdir=...: missing"),
        (["--workdir=missing"], "error: --workdir=missing: has no metrics.jsonl"),
        (["--workdir=x", "--output=missing/a.png"], "error: --output=missing/a.png: there is no"),
        (["--workdir=x", "--ouput=a.png"], "error: --ouput=a.png: no such flag; did you mean --output?"),
        (["--workdir=x", "--output=/"], "error: --output=/: is a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        cli.plot(["plots", *argv])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "tra', b"\xff\xfe", b"[]", b'{"a": 1}', b'{"step": 2, "a": "x"}']
)
def test_a_damaged_line_is_named(workdir, line, capsys):
    metrics = workdir / plots.METRICS_FILE
    metrics.write_bytes(b'{"step": 1, "train/loss": 5.5}\n' + line + b"\n")
    with pytest.raises(SystemExit) as stopped:
        cli.plot(["plots", f"--workdir={workdir}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {metrics}: line 2 is damaged; remove that line\n"


def test_a_run_is_drawn_while_it_goes_on(workdir):
    painter = plots.Painter(workdir, tell=pytest.fail)
    painter.draw()
    painter.draw()
    painter.close()
    assert (workdir / "loss.png").read_bytes().startswith(PNG)


def test_without_matplotlib_it_is_said_once(workdir, monkeypatch):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    told = []
    painter = plots.Painter(workdir, told.append)
    painter.draw()
    painter.draw()
    painter.close()
    assert told == ['no loss.png: pictures need matplotlib: pip install "sparseformer_jax[plots]"']
    with pytest.raises(ConfigError, match="pictures need matplotlib"):
        plots.draw(workdir)


def test_a_disk_that_takes_no_picture_does_not_end_the_run(workdir):
    (workdir / "loss.png").mkdir()
    told = []
    painter = plots.Painter(workdir, told.append)
    painter.draw()
    painter.close()
    (line,) = told
    assert line.startswith("no loss.png: ")
