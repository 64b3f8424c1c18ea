"""The commands: train, evaluate and sample, from flags, with one line for a user's mistake."""

import io
import itertools
import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import config_flags
from sparseformer_jax.checks import ConfigError, NonFiniteError, suggest

_TRAIN_USAGE = """\
Trains a model from a config; the same command again resumes where it stopped.

  python train.py --config=configs/quickstart.py --workdir=/tmp/run
  python train.py --config=configs/quickstart.py:masformer --workdir=/tmp/run \\
      --config.model.num_layers=6 --config.data.files=book.txt,notes.txt
  python train.py --config=configs/quickstart.py --describe

An installed package has the same command as `sparseformer-train`.
"""

_EVAL_USAGE = """\
Evaluates a checkpoint: perplexity and bits per byte on held-out text.

  python eval.py --workdir=/tmp/run
  python eval.py --workdir=/tmp/run --split=test --output=/tmp/test.json
  python eval.py --workdir=/tmp/run --step=500 --config.eval.num_batches=0
  python eval.py --workdir=/tmp/run --plots=/tmp/pictures

An installed package has the same command as `sparseformer-eval`.
"""

_SAMPLE_USAGE = """\
Continues a prompt with a trained model.

  python -m sparseformer_jax.generate --workdir=/tmp/run --prompt="def "
  python -m sparseformer_jax.generate --workdir=/tmp/run --temperature=0 --num_tokens=80

An installed package has the same command as `sparseformer-generate`.
"""

_PLOT_USAGE = """\
Draws a run: loss, evaluation, learning rate and speed over steps.

  python -m sparseformer_jax.evaluation.plots --workdir=/tmp/run
  python -m sparseformer_jax.evaluation.plots --workdir=/tmp/run --output=loss.png
"""

_CONFIG_HELP = """\
  --config.KEY=VALUE         override a key, e.g. --config.train.num_steps=500
                             sparseformer_jax/default_config.py documents all keys
"""

_SMALLER = "make the model, the batch or data.seq_len smaller, or mesh.fsdp larger"


def train(argv: Sequence[str] | None = None) -> None:
    """Runs the training command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = _new_flags()
    _text(own, "config", "config file, FILE.py or FILE.py:ARGUMENT")
    _text(own, "workdir", "folder of checkpoints and metrics; made if missing")
    _number(own, "step", "checkpoint to go on from; later ones are left behind")
    _switch(own, "describe", "print config, size, FLOPs and memory; do not train")
    _switch(own, "accept_changed_config", "resume though the config has changed")
    _switch(own, "ignore_memory_estimate", "train though memory seems too small")
    _distributed(own)
    _run(_train, own, _TRAIN_USAGE, sys.argv if argv is None else argv)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Runs the evaluation command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = _new_flags()
    _text(own, "workdir", "folder that training wrote")
    _text(own, "config", "config file; default: the config saved in the workdir")
    _number(own, "step", "checkpoint to load; default: the latest")
    _text(own, "split", "train, validation or test; default: the config's")
    _text(own, "output", "JSON file of the results; default: eval_SPLIT_STEP[_DIGEST].json there")
    _text(own, "plots", "folder of pictures: kept pairs of layers and heads, loss by position")
    _distributed(own)
    _run(_evaluate, own, _EVAL_USAGE, sys.argv if argv is None else argv)


def sample(argv: Sequence[str] | None = None) -> None:
    """Runs the sampling command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = _new_flags()
    _text(own, "workdir", "folder that training wrote")
    _text(own, "config", "config file; default: the config saved in the workdir")
    flags.DEFINE_string("prompt", "", "text to continue", own)
    flags.DEFINE_integer("num_tokens", 256, "tokens to sample at most", 1, flag_values=own)
    flags.DEFINE_float("temperature", 0.8, "of the softmax; 0: the likeliest", 0.0, flag_values=own)
    flags.DEFINE_integer("seed", 0, "of the sampling", 0, flag_values=own)
    _number(own, "step", "checkpoint to load; default: the latest")
    _run(_sample, own, _SAMPLE_USAGE, sys.argv if argv is None else argv)


def plot(argv: Sequence[str] | None = None) -> None:
    """Runs the command that draws a run; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = _new_flags()
    _text(own, "workdir", "folder that training wrote")
    _text(own, "output", "PNG file; default: loss.png there")
    _run(_plot, own, _PLOT_USAGE, sys.argv if argv is None else argv)


def _train(own: flags.FlagValues, argv: list[str]) -> None:
    _require(own, argv, "config")
    if not own.describe:
        _require(own, argv, "workdir")
    config = config_flags.load(own.config)
    _override(config, own, argv)
    _order_sums(config)
    # Imported late, here and below: a mistyped flag is told at once.
    _start_jax(own)
    _validate(config)
    if own.describe:
        from sparseformer_jax import describe

        print(describe.describe(config))
    else:
        from sparseformer_jax import memory
        from sparseformer_jax.training import loop

        if not own.ignore_memory_estimate:
            memory.check(config)
        accept, workdir = own.accept_changed_config, pathlib.Path(own.workdir)
        loop.train(config, workdir, step=own.step, accept_changed_config=accept)


def _evaluate(own: flags.FlagValues, argv: list[str]) -> None:
    _require(own, argv, "workdir")
    config = config_flags.load(own.config) if own.config else _saved(own.workdir)
    _override(config, own, argv)
    if own.split:
        config.eval.split = own.split
    _start_jax(own)
    _validate(config)
    from sparseformer_jax import mesh
    from sparseformer_jax.evaluation import perplexity, results

    workdir, output = pathlib.Path(own.workdir), own.output and pathlib.Path(own.output)
    if mesh.is_primary():
        field = "--output" if output else "--workdir"
        results.check_folder(field, output or workdir / "eval.json")
    plots = pathlib.Path(own.plots) if own.plots else None
    found = perplexity.evaluate_checkpoint(
        config, workdir, step=own.step, split=own.split, plots=plots
    )
    if mesh.is_primary():
        if plots is not None:
            print(f"pictures are in {plots}", file=sys.stderr)
        print(json.dumps(found, indent=2))
        print(results.write(output or workdir / results.file_name(found), found), file=sys.stderr)


def _sample(own: flags.FlagValues, argv: list[str]) -> None:
    _require(own, argv, "workdir")
    config = config_flags.load(own.config) if own.config else _saved(own.workdir)
    _override(config, own, argv)
    _start_jax(own)
    _validate(config)
    from sparseformer_jax.generation import sampling

    pieces = sampling.stream(
        config,
        pathlib.Path(own.workdir),
        own.prompt,
        num_tokens=own.num_tokens,
        temperature=own.temperature,
        seed=own.seed,
        step=own.step,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every character
        sys.stdout.reconfigure(errors="replace")
    for piece in itertools.chain([own.prompt], pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _plot(own: flags.FlagValues, argv: list[str]) -> None:
    _require(own, argv, "workdir")
    _override(ConfigDict(), own, argv)
    from sparseformer_jax.evaluation import plots, results

    output = pathlib.Path(own.output) if own.output else None
    if output is not None:
        results.check_folder("--output", output)
    print(plots.draw(pathlib.Path(own.workdir), output))


def _run(
    main: Callable[[flags.FlagValues, list[str]], None],
    own: flags.FlagValues,
    usage: str,
    argv: Sequence[str],
) -> None:
    """Calls `main` with the parsed flags and the arguments that are not among them."""
    try:
        rest = own(argv, known_only=True)
        # Libraries, grain among them, read absl's global flags.
        flags.FLAGS(argv[:1])
        if own.help:
            print(usage + "\n" + _flag_list(own) + ("config" in own) * _CONFIG_HELP, end="")
            return
        _check_devices()
        main(own, rest)
    except (ConfigError, flags.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a file that cannot be read or written
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        # XLA's own error, by its status, goes on with a table of allocations.
        line = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in line:
            raise
        print(f"error: not enough memory: {line}; {_SMALLER}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, ImportError) as error:
        interrupt = _interrupt(error)
        if interrupt is None:
            raise
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an error: an extension that it stops in loading raises ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _override(config: ConfigDict, own: flags.FlagValues, argv: list[str]) -> None:
    """Applies `--config.KEY=VALUE`; whatever else is left over is a mistake."""
    try:
        positional = config_flags.override(config, argv)[1:]
    except flags.UnrecognizedFlagError as error:
        keys = (f"--config.{key}" for key in config_flags.keys(config))
        advice = suggest(f"--{error.flagname}", [*(f"--{name}" for name in own), *keys])
        raise ConfigError(f"{error.flagvalue}: no such flag{advice}") from None
    if positional:
        raise ConfigError(f"{positional[0]}: not expected; flags are --name=value")


def _saved(workdir: str) -> ConfigDict:
    from sparseformer_jax.config import completed, from_json

    file = pathlib.Path(workdir) / "config.json"
    if not file.is_file():
        raise ConfigError(f"--workdir={workdir}: has no config.json; pass --config")
    try:
        return completed(from_json(file.read_bytes()))
    except ValueError as error:
        raise ConfigError(
            f"{file}: {error}; pass --config, or train on: it is written anew"
        ) from None


def _check_devices() -> None:
    """Refuses a number of simulated devices that JAX would refuse while it is imported."""
    number = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not re.fullmatch(r"-1|[1-9]\d{0,3}", number):
        raise ConfigError(f"JAX_NUM_CPU_DEVICES={number}: must be a number from 1 to 9999")


def _order_sums(config: ConfigDict) -> None:
    """Has XLA add in one order on a GPU, before JAX starts; elsewhere it always does."""
    section = config.get("train")  # anything, as the config is not checked yet
    if isinstance(section, ConfigDict) and not section.get("deterministic", True):
        return
    is_told = "deterministic_ops" in os.environ.get("XLA_FLAGS", "")
    if not is_told and os.environ.get("JAX_PLATFORMS") != "cpu":
        _set_xla_flag("--xla_gpu_exclude_nondeterministic_ops=true")


def _order_collectives() -> None:
    """Has simulated devices meet in one order: else they may wait for each other for ever."""
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
    is_simulated = os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1"
    if is_simulated and flag not in os.environ.get("XLA_FLAGS", ""):
        _set_xla_flag(f"{flag}=false")


def _set_xla_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".lstrip()


def _start_jax(own: flags.FlagValues) -> None:
    """Turns on the persistent compilation cache, connects the processes, finds the devices."""
    _order_collectives()
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        folder = pathlib.Path(cache).expanduser() / "sparseformer_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "coordinator_address" in own:
        from sparseformer_jax import mesh

        mesh.initialize_distributed(own.coordinator_address, own.num_processes, own.process_id)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without a word
        line = str(error).partition("\n")[0] or "no such device; is JAX installed for it?"
        raise ConfigError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {line}") from error


def _validate(config: ConfigDict) -> None:
    from sparseformer_jax.config import validate

    validate(config)
    config.lock()


def _require(own: flags.FlagValues, argv: list[str], name: str) -> None:
    """Refuses a flag that is missing, and first one that may be it, mistyped."""
    if own[name].value:
        return
    for argument in argv[1:]:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not flag.startswith(("--config.", "--noconfig.")):
            raise ConfigError(f"{argument}: no such flag{suggest(flag, [f'--{x}' for x in own])}")
    raise ConfigError(f"--{name}=...: missing; the {own[name].help}")


def _new_flags() -> flags.FlagValues:
    own = flags.FlagValues()
    own.set_gnu_getopt()
    _switch(own, "help", "show this")
    return own


def _text(own: flags.FlagValues, name: str, help_text: str) -> None:
    flags.DEFINE_string(name, None, help_text, own)


def _number(own: flags.FlagValues, name: str, help_text: str) -> None:
    flags.DEFINE_integer(name, None, help_text, 0, flag_values=own)


def _switch(own: flags.FlagValues, name: str, help_text: str) -> None:
    flags.DEFINE_boolean(name, False, help_text, own)


def _distributed(own: flags.FlagValues) -> None:
    _text(own, "coordinator_address", "HOST:PORT; with the next two, for many hosts")
    _number(own, "num_processes", "processes in all; default: found in the cluster")
    _number(own, "process_id", "number of this process, from 0")


def _flag_list(own: flags.FlagValues) -> str:
    lines = []
    for name in own:
        value = "" if own[name].boolean else "=..."
        lines.append(f"  {f'--{name}{value}':<27}{own[name].help}\n")
    return "".join(lines)
