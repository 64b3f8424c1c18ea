"""The command line teaches, overrides, and tells every mistake in one line."""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from sparseformer_jax import cli, command, config, default_config
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.generation.choice import Choice

DEFAULT = "--config=configs/default.py"


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What the commands called, in place of training and evaluation."""
    made = []

    def stub(name: str, **functions) -> None:
        module = types.ModuleType(f"sparseformer_jax.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        package, _, attribute = module.__name__.rpartition(".")
        __import__(package)
        monkeypatch.setattr(sys.modules[package], attribute, module, raising=False)

    def train(config, workdir, *, step, accept_changed_config) -> None:
        made.append((config, workdir, step, accept_changed_config))

    def evaluate_checkpoint(config, workdir, *, step, split, plots) -> dict[str, float]:
        made.append((config, workdir, step, split, plots))
        return {"step": 5, "split": config.eval.split, "text": "", "overrides": {}, "loss": 1.5}

    class Sampler:
        def __init__(self, config, workdir, **options) -> None:
            self.options = options

        def stream(self, prompt, num_tokens, stop) -> list[str]:
            made.append((prompt, num_tokens, stop, self.options))
            return [" and", " eggs"]

    stub("training.loop", train=train)
    stub("evaluation.perplexity", evaluate_checkpoint=evaluate_checkpoint)
    stub("generation.sampling", Sampler=Sampler)
    stub("describe", describe=lambda config: f"{config.model.num_layers} layers")
    stub("memory", check=lambda config: None)
    monkeypatch.setattr(command, "start_jax", lambda own: None)
    return made


def mistake(capsys, *argv: str, command=cli.train) -> str:
    with pytest.raises(SystemExit) as stopped:
        command(["train.py", *argv])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --config=...: missing"),
        ([DEFAULT], "error: --workdir=...: missing"),
        (["--config=configs/defalt.py"], "error: config=configs/defalt.py: no such file; did you mean configs/default.py?"),
        ([f"{DEFAULT}:tiny"], "error: config=configs/default.py:tiny: get_config(): too many"),
        ([DEFAULT, "--workdr=/tmp/x"], "error: --workdr=/tmp/x: no such flag; did you mean --workdir?"),
        ([DEFAULT, "--config.model.num_layer=3"], "error: --config.model.num_layer=3: no such flag; did you mean --config.model.num_layers?"),
        ([DEFAULT, "--config.model.num_layers=x"], "error: flag --config.model.num_layers=x: must be int"),
        ([DEFAULT, "--config.model.num_layers"], "error: Missing value for flag --config.model.num_layers"),
        ([DEFAULT, "--config.model.qk_norm=x"], "error: flag --config.model.qk_norm=x: must be bool"),
        ([DEFAULT, "--config.seed=None"], "error: seed=None: must be int, not NoneType"),
        ([DEFAULT, "--config.train.profile_steps=a,b"], "error: train.profile_steps=('a', 'b'): must be tuple[int, ...]"),
        ([DEFAULT, "--config.model.num_kv_heads=3"], "error: model.num_heads=4: must be a multiple of"),
        ([DEFAULT, "extra"], "error: extra: not expected"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, calls, argv, message):
    workdir = [] if argv in ([], [DEFAULT]) else ["--workdir=/tmp/x"]
    assert mistake(capsys, *argv, *workdir).startswith(message)
    assert not calls


def test_overrides_reach_training(calls):
    cli.train(
        [
            *(
                "train.py",
                "--workdir=/tmp/x",
                DEFAULT,
                "--config.model.num_layers",
                "2",
            ),
            *("--config.model.qk_norm", "--noconfig.data.shuffle"),
            *("--config.model.attention_scale=0.5", "--config.data.files=a,b/*.txt"),
            *("--config.train.profile_steps=(10, 12)", "--accept_changed_config"),
            *("--config.mesh.fsdp=8", "--config.optimizer.learning_rate=1"),
        ]
    )
    ((given, workdir, step, accept),) = calls
    assert (workdir, step, accept) == (pathlib.Path("/tmp/x"), None, True)
    assert config.diff(default_config.get_config(), given) == {
        "data.files": "() -> ('a', 'b/*.txt')",
        "data.shuffle": "True -> False",
        "mesh.fsdp": "1 -> 8",
        "model.attention_scale": "None -> 0.5",
        "model.num_layers": "4 -> 2",
        "model.qk_norm": "False -> True",
        "optimizer.learning_rate": "0.003 -> 1.0",
        "train.profile_steps": "() -> (10, 12)",
    }
    assert given.is_locked


def test_too_little_memory_is_told_before_training_and_can_be_ignored(calls, capsys, monkeypatch):
    def check(config) -> None:
        raise ConfigError("config: needs more")

    monkeypatch.setattr(sys.modules["sparseformer_jax.memory"], "check", check)
    assert mistake(capsys, DEFAULT, "--workdir=x") == "error: config: needs more"
    assert not calls
    cli.train(["train.py", DEFAULT, "--workdir=x", "--ignore_memory_estimate"])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("", ()),
        ("a.txt", ("a.txt",)),
        ("a.txt, b/[0-9]*", ("a.txt", "b/[0-9]*")),
        ("('a.txt',)", ("a.txt",)),
        ('["a.txt"]', ("a.txt",)),
        ("'a,b.txt'", ("a,b.txt",)),
    ],
)
def test_tuples_need_no_quotes(calls, text, files):
    cli.train(["train.py", DEFAULT, "--workdir=x", f"--config.data.files={text}"])
    assert calls[0][0].data.files == files


def test_none_unsets(calls, tmp_path):
    file = tmp_path / "capped.py"
    file.write_text(
        "from sparseformer_jax import default_config\n"
        "def get_config(cap):\n"
        "    config = default_config.get_config()\n"
        "    config.model.logits_soft_cap = float(cap)\n"
        "    return config\n"
    )
    cli.train(["train.py", f"--config={file}:30", "--workdir=x"])
    argv = [f"--config={file}:30", "--workdir=x", "--config.model.logits_soft_cap=None"]
    cli.train(["train.py", *argv])
    caps = [call[0].model.logits_soft_cap for call in calls]
    assert caps == [30.0, None]


def test_an_error_inside_a_config_file_keeps_its_traceback(calls, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return {}['typo']\n")
    with pytest.raises(KeyError, match="typo"):
        cli.train(["train.py", f"--config={file}", "--workdir=x"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the file defines no get_config()"),
        ("x = 1\ndef get_config(:\n", "broken.py: line 2: invalid syntax"),
        ("x = '\0'", "broken.py: source code"),
        ("def get_config(): pass", "get_config() returned NoneType, no ConfigDict"),
        ("def get_config(size): pass", "get_config(): missing a required"),
    ],
)
def test_a_file_that_is_no_config_is_told(calls, capsys, tmp_path, source, message):
    file = tmp_path / "broken.py"
    file.write_text(source)
    assert message in mistake(capsys, f"--config={file}", "--workdir=x")


def test_describe_needs_no_workdir(calls, capsys):
    cli.train(["train.py", DEFAULT, "--describe"])
    assert capsys.readouterr().out == "4 layers\n"
    assert not calls


def test_evaluate_takes_the_saved_config(calls, capsys, tmp_path):
    saved = default_config.get_config()
    saved.model.num_layers = 3
    (tmp_path / "config.json").write_text(config.to_json(saved))
    output = tmp_path / "results.json"
    argv = [f"--workdir={tmp_path}", "--step=5", "--split=test", f"--output={output}"]
    cli.evaluate(["eval.py", *argv, "--config.eval.num_batches=0"])
    ((given, _, step, split, plots),) = calls
    assert (given.model.num_layers, step, split, plots) == (3, 5, "test", None)
    assert (given.eval.split, given.eval.num_batches) == ("test", 0)
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert (found["step"], found["loss"]) == (5, 1.5)
    assert output.read_text() == printed
    cli.evaluate(["eval.py", f"--workdir={tmp_path}"])
    assert json.loads((tmp_path / "eval_validation_5.json").read_text())["step"] == 5


def test_sample_continues_the_prompt(calls, capsys, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(default_config.get_config()))
    argv = [f"--workdir={tmp_path}", "--prompt=spam", "--temperature=0"]
    cli.sample(["generate.py", *argv])
    assert capsys.readouterr().out == "spam and eggs\n"
    options = {"choice": Choice(0.0), "seed": 0, "step": None}
    assert calls == [("spam", 256, [], options)]
    cli.sample(["generate.py", *argv, r"--stop=\n\n", "--stop=Q:"])
    assert calls[1][2] == ["\n\n", "Q:"]
    assert "--stop=: empty" in mistake(capsys, *argv, "--stop=", command=cli.sample)
    message = mistake(capsys, f"--workdir={tmp_path}", "--temperature=-1", command=cli.sample)
    assert "--temperature=-1" in message


def test_the_prompt_is_an_argument_a_file_or_standard_input(calls, capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(default_config.get_config()))
    (tmp_path / "page.txt").write_bytes("naïve".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"spam\n")))
    for file in (str(tmp_path / "page.txt"), "-"):
        cli.sample(["generate.py", f"--workdir={tmp_path}", f"--prompt_file={file}"])
    assert [prompt for prompt, *_ in calls] == ["naïve", "spam\n"]
    capsys.readouterr()
    sample = functools.partial(mistake, capsys, f"--workdir={tmp_path}", command=cli.sample)
    assert "--prompt_file=-: goes without --prompt" in sample("--prompt=a", "--prompt_file=-")
    assert r"--prompt='a\udcff': not UTF-8 at character 1" in sample("--prompt=a\udcff")
    (tmp_path / "page.txt").write_bytes(b"ab\xff")
    assert "page.txt: not UTF-8 at character 2" in sample(f"--prompt_file={tmp_path}/page.txt")
    assert "No such file" in sample(f"--prompt_file={tmp_path}/none.txt")


def test_a_sample_is_shown_on_a_terminal_without_its_characters(calls, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(default_config.get_config()))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    cli.sample(["generate.py", f"--workdir={tmp_path}", "--prompt=naïve"])
    assert shown.getvalue() == b"na?ve and eggs\n"


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(calls, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise NonFiniteError("step 3: loss is nan")

    monkeypatch.setattr(sys.modules["sparseformer_jax.training.loop"], "train", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.train(["train.py", DEFAULT, "--workdir=/tmp/x"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: step 3: loss is nan\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 GiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes\nLargest: ..."),
    ],
)
def test_too_little_memory_that_no_estimate_foresaw_is_one_line(calls, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(sys.modules["sparseformer_jax.training.loop"], "train", fail)
    line = mistake(capsys, DEFAULT, "--workdir=/tmp/x")
    first = str(error).splitlines()[0]
    assert line.startswith(f"error: not enough memory: {first}; make the model")


@pytest.mark.parametrize("command", [cli.train, cli.evaluate, cli.sample, cli.plot])
def test_a_mistyped_flag_is_told_before_the_one_that_is_missing(capsys, command):
    line = mistake(capsys, "--workdri=/tmp/x", command=command)
    assert line == "error: --workdri=/tmp/x: no such flag; did you mean --workdir?"


def test_evaluate_tells_mistakes(calls, capsys, tmp_path):
    message = mistake(capsys, f"--workdir={tmp_path}", command=cli.evaluate)
    assert message.endswith("has no config.json; name the folder of a run; or pass --config")
    argv = [f"--workdir={tmp_path}", DEFAULT, "--split=tset"]
    message = mistake(capsys, *argv, command=cli.evaluate)
    assert message.endswith("did you mean test?")


def test_help_teaches_before_jax_is_imported():
    code = (
        "import sys; sys.argv = ['train.py', '--help']\n"
        "from sparseformer_jax import cli; cli.train()\n"
        "assert 'jax' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    help_text = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = help_text.stdout.splitlines()
    assert "python train.py --config=configs/quickstart.py" in lines[2]
    assert len(lines) < 25


@pytest.mark.parametrize(
    ("platforms", "flags", "argv", "expected"),
    [
        ("cuda,cpu", "", [], "--xla_gpu_exclude_nondeterministic_ops=true"),
        (None, "--xla_a=1", [], "--xla_a=1 --xla_gpu_exclude_nondeterministic_ops=true"),
        ("cuda", "", ["--config.train.deterministic=False"], ""),
        ("cuda", "--xla_gpu_deterministic_ops=false", [], "--xla_gpu_deterministic_ops=false"),
        ("cpu", "", [], ""),
    ],
)
def test_a_gpu_adds_in_one_order_unless_told(
    calls, monkeypatch, tmp_path, platforms, flags, argv, expected
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS")
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    cli.train(["train.py", DEFAULT, f"--workdir={tmp_path}", *argv])
    assert os.environ["XLA_FLAGS"] == expected


def test_ctrl_c_while_an_extension_loads_is_an_interrupt(monkeypatch, capsys):
    """It comes as what the extension makes of it; another ImportError is told as it is."""

    def load(path):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("numpy._core.multiarray failed to import") from interrupt

    monkeypatch.setattr(cli.config_flags, "load", load)
    with pytest.raises(SystemExit) as stopped:
        cli.train(["train.py", DEFAULT, "--workdir=run"])
    assert (stopped.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    monkeypatch.setattr(cli.config_flags, "load", lambda path: __import__("no_such_module"))
    with pytest.raises(ImportError, match="no_such_module"):
        cli.train(["train.py", DEFAULT, "--workdir=run"])


@pytest.mark.parametrize(
    ("devices", "flags", "expected"),
    [
        ("8", "", "--xla_cpu_enable_concurrency_optimized_scheduler=false"),
        ("8", "--xla_cpu_enable_concurrency_optimized_scheduler", None),
        ("1", "--xla_a=1", None),
    ],
)
def test_simulated_devices_meet_in_one_order(monkeypatch, devices, flags, expected):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", devices)
    monkeypatch.setenv("XLA_FLAGS", flags)
    command.order_collectives()
    assert os.environ["XLA_FLAGS"] == (flags if expected is None else expected)


@pytest.mark.parametrize("number", ["x", "0", "-8", "", "1e3"])
def test_a_number_of_devices_that_is_none_is_one_line(calls, monkeypatch, capsys, number):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", number)
    assert f"JAX_NUM_CPU_DEVICES={number}: must be a number" in mistake(capsys, DEFAULT)
