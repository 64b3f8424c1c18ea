"""Retrieval tells who answers from who does not, by length and depth, in numbers and pictures."""

import json
import re
from pathlib import Path

import pytest

from sparseformer_jax import cli, command, default_config
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import to_json
from sparseformer_jax.data.tokenizer import ByteTokenizer
from sparseformer_jax.evaluation.retrieval import accuracy, pictures
from sparseformer_jax.evaluation.retrieval.tasks import TASKS
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.sampling import Sampler

PNG = b"\x89PNG\r\n\x1a\n"
ANSWERS = {
    "pass key": r"The pass key is (\d+)\.",
    "number": r"The number of {} is (\d+)\.",
    "variables": r"VAR (\w+) =",
    "words": r"\b(\w{{5}}) (?=(?:.* )?\1 )",
}


class Copier(Sampler):
    """Reads the answer in the prompt, as far back as it sees."""

    sight = 10**6

    def __init__(self, config, workdir, **options):
        self.tokenizer, self.step = ByteTokenizer(), 7
        self.batches, self.options = [], options

    def continuations(self, prompts, num_tokens):
        self.batches.append((len(prompts), num_tokens))
        return [self._answer(prompt)[:num_tokens] for prompt in prompts]

    def _answer(self, prompt):
        text, _, question = prompt.rpartition("\n")
        text = text.partition("\n")[2][-self.sight :]
        asked = re.search(r"pass key|number|variables|words", question)[0]
        key = re.search(r"number of (\w+)|$", question)[1]
        return " " + ", ".join(dict.fromkeys(re.findall(ANSWERS[asked].format(key), text))) + "."


class Short(Copier):
    """Sees the last hundred characters of the text."""

    sight = 100


class Mute(Copier):
    """Says the same of every prompt."""

    def continuations(self, prompts, num_tokens):
        return [" the pass key is 0" for _ in prompts]


def evaluate(sampler, **settings):
    settings = accuracy.Settings(**{"lengths": [256, 400], "num_examples": 2} | settings)
    return accuracy.evaluate(sampler(None, None), settings, batch_size=8)


@pytest.mark.parametrize(("sampler", "expected"), [(Copier, 1.0), (Mute, 0.0)])
def test_who_copies_the_answer_has_all_right_and_who_does_not_nothing(sampler, expected):
    records = evaluate(sampler)
    assert [(x["task"], x["length"]) for x in records] == [
        (t, n) for t in TASKS for n in (256, 400)
    ]
    for record in records:
        assert record["accuracy"] == expected
        assert ("by_depth" in record) == (record["task"] in {"passkey", "needle", "multi_key"})
        for place in record.get("by_depth", []):
            assert place["accuracy"] == expected


def test_who_sees_only_the_end_misses_what_stands_before():
    (record,) = evaluate(Short, lengths=[400], tasks=["needle"], num_depths=3)
    means = {place["depth"]: place["accuracy"] for place in record["by_depth"]}
    assert means == {0: 0, 0.5: 0, 1: 1}
    assert record["accuracy"] == 0.3333


def test_prompts_go_in_batches_of_one_size():
    copier = Copier(None, None)
    settings = accuracy.Settings([256], ["needle"], num_depths=5, num_examples=2)
    accuracy.evaluate(copier, settings, batch_size=4)
    assert copier.batches == [(4, 17)] * 3
    copier.batches.clear()
    accuracy.evaluate(copier, settings, batch_size=64)
    assert copier.batches == [(10, 17)]


def test_depths_go_from_the_start_to_the_end():
    assert accuracy.Settings([256], num_depths=5).depths == [0, 0.25, 0.5, 0.75, 1]
    assert accuracy.Settings([256], num_depths=1).depths == [0.5]


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A run whose model copies."""
    monkeypatch.setattr(accuracy, "Sampler", Copier)
    monkeypatch.setattr(command, "start_jax", lambda own: None)
    config = default_config.get_config()
    config.data.seq_len = 512
    (tmp_path / "config.json").write_text(to_json(config))
    return tmp_path


def retrieve(workdir, output, *flags):
    cli.retrieve(["retrieval", f"--workdir={workdir}", f"--output={output}", *flags])


def test_the_command_writes_numbers_pictures_and_a_table(workdir, capsys):
    folder = workdir / "found" / "here"
    flags = ["--lengths=400,256", "--depths=2", "--examples=1"]
    retrieve(workdir, folder, *flags, "--tasks=passkey,common_words")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "accuracy         256     400",
        "passkey         1.00    1.00",
        "common_words    1.00    1.00",
    ]
    assert err == f"written to {folder}/retrieval.json, with a picture of each task\n"
    found = json.loads((folder / "retrieval.json").read_text())
    subject = {name: found[name] for name in ("step", "attention", "window", "tokenizer", "seed")}
    assert subject == {"step": 7, "attention": "dense", "window": 512, "tokenizer": "bytes", "seed": 0}  # fmt: skip
    assert found["accuracy"][0] == {
        "task": "passkey",
        "length": 400,
        "answer_tokens": 15,
        "accuracy": 1.0,
        "by_depth": [{"depth": 0.0, "accuracy": 1.0}, {"depth": 1.0, "accuracy": 1.0}],
    }
    assert {path.stem for path in folder.glob("*.png")} == {"passkey", "common_words"}
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))

    retrieve(workdir, folder, *flags, "--tasks=common_words")
    found["accuracy"] = found["accuracy"][2:]
    assert (folder / "retrieval.json").read_text() == json.dumps(found, indent=2) + "\n"
    assert [path.name for path in folder.glob("*.png")] == ["common_words.png"]
    assert not list(folder.glob(".*"))


def test_answers_are_the_likeliest_of_the_step_asked_for(workdir, monkeypatch):
    made = []
    monkeypatch.setattr(Copier, "__init__", lambda self, config, path, **x: made.append(x))
    with pytest.raises(AttributeError):  # it has read nothing
        retrieve(workdir, workdir / "a", "--step=3")
    assert made == [{"step": 3, "choice": Choice(0.0)}]


def test_pictures_hold_their_numbers():
    def record(task, length, accuracy, **more):
        return {"task": task, "length": length, "accuracy": accuracy, **more}

    def places(*values):
        depths = zip((0.0, 0.5, 1.0), values, strict=True)
        return {"by_depth": [{"depth": depth, "accuracy": value} for depth, value in depths]}

    drawn = pictures.draw(
        {
            "attention": "s2",
            "step": 9,
            "accuracy": [
                record("multi_key", 512, 0.5, **places(0.25, 0.5, 0.75)),
                record("multi_key", 256, 0.75, **places(0.5, 0.75, 1)),
                record("common_words", 512, 0.25),
                record("common_words", 256, 0.5),
            ],
        }
    )
    assert set(drawn) == {"multi_key", "common_words"}
    panel, bar = drawn["multi_key"].axes
    (cells,) = panel.collections
    assert cells.get_array().tolist() == [[0.5, 0.25], [0.75, 0.5], [1.0, 0.75]]
    assert cells.get_clim() == (0, 1)
    assert [text.get_text() for text in panel.texts] == ["0.50", "0.25", "0.75", "0.50", "1.00", "0.75"]  # fmt: skip
    assert [text.get_text() for text in panel.get_xticklabels()] == ["256", "512"]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["0%", "50%", "100%"]
    assert panel.yaxis_inverted()
    assert panel.get_title() == "multi key: s2, step 9"
    labels = panel.get_xlabel(), panel.get_ylabel(), bar.get_ylabel()
    assert labels == ("length (tokens)", "depth in the text", "accuracy")
    (panel,) = drawn["common_words"].axes
    assert panel.lines[0].get_ydata().tolist() == [0.5, 0.25]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("length (tokens)", "accuracy")


def test_many_cells_have_no_numbers_and_few_labels():
    places = [{"depth": n / 29, "accuracy": 1.0} for n in range(30)]
    records = [{"length": n, "by_depth": places} for n in range(256, 1000, 16)]
    panel, _ = pictures.heat_map(records, "").axes
    assert not panel.texts
    assert max(len(panel.get_xticks()), len(panel.get_yticks())) <= 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths=256,1024"], "--lengths=1024: the model's window is 512 tokens; ask for less, or pass --config.data.seq_len=1024"),
        (["--lengths=64"], "--lengths=64: passkey takes 161 tokens or more"),
        (["--lengths=0"], "--lengths=0: must be at least 1"),
        (["--lengths=256,"], "--lengths=256,: must be numbers of tokens, as 256,512"),
        (["--lengths=256,256"], "--lengths=256,256: names one twice"),
        (["--tasks=passkey,needel"], "--tasks='needel': not one of passkey, needle, multi_key, variable_tracking, common_words; did you mean needle?"),
        (["--depths=0"], "--depths=0: must be at least 1"),
        (["--examples=0"], "--examples=0: must be at least 1"),
        (["--length=256"], "--length=256: no such flag; did you mean --lengths?"),
        (["--seed=-1"], "flag --seed=-1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(workdir, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        retrieve(workdir, workdir / "a", *flags)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(workdir.glob("a/*"))


def test_a_folder_that_cannot_be_is_told_before_the_work(workdir, capsys):
    for output, message in {
        workdir / "config.json": f"--output={workdir}/config.json: is a file; name a folder",
        "": "--output=...: missing; the folder of the results; made if missing",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            retrieve(workdir, output)
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_settings_of_a_program_are_checked_alike():
    with pytest.raises(ConfigError, match="--lengths=-5: must be at least 1"):
        accuracy.Settings([-5])
