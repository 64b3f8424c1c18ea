"""Real processes: a mistake is one line on stderr, its exit code is 2, and nothing is lost.

The commands of a table run one after the other in one process, as JAX starts slowly; the
exhaustive variant gives each a process of its own.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseformer_jax import default_config
from sparseformer_jax.config import to_json
from tests.commands import ROOT, TIMEOUT, run

SHORT = (
    *("--config=configs/s2.py:tiny", "--config.data.files={tmp}/train.txt"),
    *("--config.eval.split=train", "--config.train.num_steps=2", "--config.data.seq_len=64"),
    *("--config.optimizer.warmup_steps=0", "--config.model.num_layers=1"),
    "--config.eval.plots=False",
)

# Each is added to a training command that is right.
TRAIN = {
    "--config.model.attention_scale=inf": "model.attention_scale=inf: must be from",
    "--config.model.attention_scale=nan": "model.attention_scale=nan: must be from",
    "--config.model.vocab_size=1000000000": "model.vocab_size=1000000000: must be from",
    "--config.model.head_dim=1000000": "model.head_dim=1000000: must be from",
    "--config.train.batch_size=8000000": "config: needs at least",
    "--config.model.dropout=0.999999999": "model.dropout=0.999999999: must be from 0 to 0.99",
    "--config.model.logits_soft_cap=1e-30": "model.logits_soft_cap=1e-30: must be from",
    "--config.model.norm_eps=inf": "model.norm_eps=inf: must be from",
    "--config.optimizer.learning_rate=inf": "optimizer.learning_rate=inf: must be from",
    "--config.optimizer.b2=nan": "optimizer.b2=nan: must be from",
    "--config.attention.vert_stride=1000000000000": "attention.vert_stride=1000000000000: must be",
    "--config.train.profile_steps=5,9": "train.profile_steps=(5, 9): must be (first, last)",
    "--config.data.prefetch=1000000000": "data.prefetch=1000000000: must be from",
    "--config.data.text_field=": "data.text_field='': empty",
    "--config.data.files=5": "data.files=(5,): must be tuple[str, ...], not tuple[int]; a name",
    "--config.model.num_layer=3": "--config.model.num_layer=3: no such flag; did you mean",
    "--config.model.num_layers=1.5": "flag --config.model.num_layers=1.5: must be int",
    "--config={tmp}/broken.py": "config={tmp}/broken.py: line 2: invalid syntax",
    "--config={tmp}/missing.py": "config={tmp}/missing.py: no such file",
    "--config=configs/pgf.py:2:x": "sparsity.targets='ff=2:x': pattern '2:x': must be n:m, n kept",
    "--coordinator_address=here": "coordinator_address, num_processes and process_id go together",
    "--workdir=": "--workdir=...: missing",
}
# The same, but told when the text is read: the workdir is there by then.
TEXT = {
    "--config.data.files={tmp}/pipe.txt": "data.files: '{tmp}/pipe.txt' is a pipe",
    "--config.data.files={tmp}/link.txt": "data.files: '{tmp}/link.txt' is a link to nothing",
    "--config.data.cache_dir={tmp}/train.txt": "data.cache_dir: cannot write to '{tmp}/train.txt/",
}
SAMPLE = {
    "--prompt=a\udcff": "--prompt='a\\udcff': not UTF-8 at character 1",
    f"--seed={2**70}": f"--seed={2**70}: must be from 0 to below 2**32",
    "--temperature=nan": "--temperature=nan: must be from 0.001 to 1000",
    "--temperature=-1": "flag --temperature=-1",
    "--num_tokens=0": "flag --num_tokens=0",
    "--step=7": "no checkpoint of step 7",
    "--workdir={tmp}/missing": "--workdir={tmp}/missing",
}
EVALUATE = {
    "--split=tset": "eval.split='tset': not one of train, validation, test; did you mean test?",
    "--step=7": "no checkpoint of step 7",
    "--workdir={tmp}/missing": "--workdir={tmp}/missing",
    "--plots={tmp}/train.txt": "--plots={tmp}/train.txt: is a file; name a folder",
}


def table(tmp: Path) -> list[tuple[str, list[str], str]]:
    """Commands, their flags and how the one line begins, in the order in which they run."""
    rows = []
    for command, mistakes, right in (
        ("train", TRAIN, (*SHORT, "--workdir={tmp}/refused")),
        ("train", TEXT, (*SHORT, "--workdir={tmp}/begun")),
        ("sample", SAMPLE, ("--workdir={tmp}/run",)),
        ("evaluate", EVALUATE, ("--workdir={tmp}/run",)),
    ):
        for flag, line in mistakes.items():
            flags = [part.replace("{tmp}", str(tmp)) for part in (*right, flag)]
            rows.append((command, flags, "error: " + line.replace("{tmp}", str(tmp))))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, what is no text, a file that is no Python, and a finished run."""
    tmp = tmp_path_factory.mktemp("processes")
    (tmp / "train.txt").write_text("It was a bright cold day in April. " * 200)
    os.mkfifo(tmp / "pipe.txt")
    (tmp / "link.txt").symlink_to("nowhere")
    (tmp / "broken.py").write_text("x = 1\ndef get_config(:\n")
    return tmp


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def check(rows: list[tuple[str, list[str], str]], outcomes: list[tuple[int, list[str]]]) -> None:
    for (command, flags, line), (code, lines) in zip(rows, outcomes, strict=True):
        said = f"{command} {' '.join(flags)}\n" + "\n".join(lines)
        assert len(lines) == 1, ascii(said)
        assert lines[0].startswith(line), ascii(said)
        assert code == 2, ascii(said)


def finish(folder: Path) -> list[str]:
    return [*(flag.replace("{tmp}", str(folder)) for flag in SHORT), f"--workdir={folder}/run"]


def test_a_mistake_is_one_line_with_exit_code_2_and_nothing_is_lost(folder):
    rows = table(folder)
    ((code, lines),) = run([("train", finish(folder))])
    assert (code, lines) == (0, [])
    before = contents(folder / "run")
    check(rows, run([row[:2] for row in rows]))
    assert contents(folder / "run") == before
    assert not (folder / "refused").exists()
    # And the run can still be used.
    ((code, _),) = run([("sample", [f"--workdir={folder}/run", "--num_tokens=2"])])
    assert code == 0


def test_a_platform_that_is_not_there_is_one_line(folder):
    ((code, (line,)),) = run([("train", finish(folder))], JAX_PLATFORMS="bogus")
    assert code == 2
    assert line.startswith("error: JAX_PLATFORMS=bogus: Unable to initialize backend 'bogus'")


@pytest.mark.exhaustive
def test_every_mistake_in_a_process_of_its_own(folder):
    run([("train", finish(folder))])
    for row in table(folder):
        check([row], run([row[:2]]))


@pytest.mark.parametrize(
    "script",
    [
        *("train.py", "eval.py", "-m sparseformer_jax.generate"),
        *("-m sparseformer_jax.evaluation.plots", "-m sparseformer_jax.evaluation.retrieval"),
    ],
)
def test_help_and_mistyped_flags_are_answered_without_jax(script, folder):
    """Whoever imports jax, flax or numpy pays with seconds."""
    (folder / "saved").mkdir(exist_ok=True)
    (folder / "saved/config.json").write_text(to_json(default_config.get_config()))
    (folder / "saved/metrics.jsonl").touch()
    config = "--config=configs/default.py" if script == "train.py" else "--step=1"
    mistyped = [f"--workdir={folder}/saved", *[config] * ("plots" not in script), "--outpt=y"]
    for flags, code, said in ((["--help"], 0, script), (mistyped, 2, "--outpt=y: no such flag")):
        process = subprocess.run(
            [sys.executable, "-X", "importtime", *script.split(), *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert process.returncode == code
        assert said in process.stdout + process.stderr
        imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
        assert "absl.flags" in imported
        assert not imported & {"jax", "flax", "grain", "tensorflow_datasets", "matplotlib"}
