"""What README and --help print runs as printed, on less text and with fewer steps."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import tokenizers

from sparseformer_jax import cli, config, config_flags
from tests.commands import ROOT, run

README = (ROOT / "README.md").read_text()
COMMANDS = {
    "python train.py": "train",
    "python eval.py": "evaluate",
    "python -m sparseformer_jax.generate": "sample",
    "python -m sparseformer_jax.evaluation.plots": "plot",
    "python -m sparseformer_jax.evaluation.retrieval": "retrieve",
}
# After the flags of a command: the same, but small.
SHORT = (
    *("--config.train.num_steps=2", "--config.optimizer.warmup_steps=0", "--config.eval.every=0"),
    *(
        "--config.optimizer.decay_steps=1",
        "--config.train.batch_size=2",
        "--config.model.remat=none",
    ),
    *(
        "--config.train.accumulation_steps=1",
        "--config.data.seq_len=512",
        "--config.eval.num_batches=1",
        "--config.eval.plots=False",
    ),
    *("--config.model.num_layers=1", "--config.model.embed_dim=32", "--config.model.mlp_dim=32"),
    *("--config.model.compute_dtype=float32", "--config.model.vocab_size=600"),
)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of ours that a text shows, with their flags; lines that end in \\ go on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("    $ ").removeprefix("    ").strip()
        line = line.partition("&& ")[2] if line.startswith("pip install -e . && ") else line
        for start, command in COMMANDS.items():
            if line.startswith(f"{start} --"):
                found.append((command, shlex.split(line.removeprefix(start))))
    return found


def usage(command: str, capsys) -> str:
    getattr(cli, command)([command, "--help"])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that README's and --help's commands name."""
    tmp = tmp_path_factory.mktemp("readme")
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 100
    (tmp / "books").mkdir()
    (tmp / "notes").mkdir()
    for name in ("books/one.txt", "notes/two.md", "book.txt", "notes.txt"):
        (tmp / name).write_text(text + name)
    words = ["<bos>", "<eos>", "<unk>", *set(text.split())]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp / "tokenizer.json"))
    return tmp


def shortened(shown: list[tuple[str, list[str]]], folder: Path) -> list[tuple[str, list[str]]]:
    """The commands on the folder's files; each training has a workdir, the others the first's."""
    short, trainings = [], 0
    for command, flags in shown:
        number = trainings if command == "train" else 0
        flags = [re.sub(r"--workdir=\S+", f"--workdir={folder}/run{number}", f) for f in flags]
        # An imported model and what `prune` makes of it: the first run, and its magnitudes.
        flags = [f.replace("=/tmp/model", f"={folder}/run0") for f in flags]
        flags = [f for f in flags if f != "--config.sparsity.prior=/tmp/pruned"]
        flags = [re.sub(r"=/tmp/(\w+\.json|retrieval)$", rf"={folder}/\1", f) for f in flags]
        flags = [
            re.sub(r"/data/|(?<==|,)(?=book\.txt|notes\.txt|tokenizer)", f"{folder}/", f)
            for f in flags
        ]
        flags = [
            f.replace("--step=500", "--step=2").replace("=loss.png", f"={folder}/a.png")
            for f in flags
        ]
        if command == "train":
            trainings += 1
            own_text = any("data.files" in flag for flag in flags)
            flags += [] if own_text else [f"--config.data.files={folder}/books"]
            flags += SHORT
        if command == "sample":
            flags.append("--num_tokens=4")
        if command == "retrieve":
            flags += ["--depths=1", "--examples=1"]
        short.append((command, flags))
    return short


def succeed(shown: list[tuple[str, list[str]]], folder: Path) -> None:
    short = shortened(shown, folder)
    for (command, flags), (code, lines) in zip(short, run(short), strict=True):
        assert code == 0, f"{command} {' '.join(flags)}\n" + "\n".join(lines)


def test_readmes_commands_run(folder):
    shown = commands(README.replace("    $ python", "    # python"))
    assert {command for command, _ in shown} == set(COMMANDS.values())
    assert len(shown) >= 5
    succeed(shown, folder)


def test_readmes_mistake_is_told_as_printed():
    ((flags, line),) = re.findall(r"    \$ python train.py (.*)\n    (.*)\n", README)
    assert run([("train", shlex.split(flags))]) == [(2, [line])]


@pytest.mark.exhaustive
def test_the_commands_of_help_run(folder, capsys):
    """The trainings first: the others read what they write."""
    succeed([row for name in COMMANDS.values() for row in commands(usage(name, capsys))], folder)


def test_help_shows_two_commands_of_its_own_or_more(capsys):
    for name in COMMANDS.values():
        shown = commands(usage(name, capsys))
        assert len(shown) >= 2
        assert {command for command, _ in shown} == {name}


@pytest.mark.parametrize(
    ("name", "flags"),
    [("quickstart.py", ["--config.train.batch_size=8"]), ("s2.py:small", [])],
    ids=["quickstart", "small"],
)
def test_readmes_meshes_fit_eight_devices(name, flags):
    assert all(flag in README for flag in flags)
    lines = re.findall(r"^    (--config\.mesh.*?)  ", README, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        chosen = config_flags.load(f"configs/{name}")
        config_flags.override(chosen, ["train.py", *line.split(), *flags])
        config.validate(chosen, num_devices=8)


def test_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """Block by block, as pasted into one session; the mask's picture is drawn."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        ast.parse(block)
        exec(block, names)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out


def test_readmes_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target
    pictures = re.findall(r"!\[.*?\]\((docs/.*?\.png)\)", README)
    assert len(pictures) == 2
    assert all((ROOT / name).stat().st_size < 100_000 for name in pictures)
