"""What all commands share: flags, overrides of a config, one line for a user's mistake."""

import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import config_flags
from sparseformer_jax.checks import ConfigError, NonFiniteError, check_choice, suggest

CONFIG_HELP = """\
  --config.KEY=VALUE         override a key, e.g. --config.train.num_steps=500
                             sparseformer_jax/default_config.py documents all keys
"""

_SMALLER = "make the model, the batch or data.seq_len smaller, or mesh.fsdp larger"


def run(
    main: Callable[[flags.FlagValues, list[str]], None],
    own: flags.FlagValues,
    usage: str,
    argv: Sequence[str],
) -> None:
    """Calls `main` with the parsed flags and the arguments that are not among them.

    A user's mistake ends the process with one line on stderr and exit code 2, numbers that are
    not finite with 1.
    """
    try:
        rest = own(argv, known_only=True)
        # Libraries, grain among them, read absl's global flags.
        flags.FLAGS(argv[:1])
        if own.help:
            print(usage + "\n" + _flag_list(own) + ("config" in own) * CONFIG_HELP, end="")
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


def run_one_of(
    commands: Mapping[str, Callable[[Sequence[str]], None]], usage: str, argv: Sequence[str]
) -> None:
    """Runs the command that the first argument names; without one, or with --help, tells of all.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """

    def unknown(own: flags.FlagValues, argv: list[str]) -> None:
        check_choice("command", argv[1], tuple(commands))

    program, *arguments = argv
    name = arguments[0] if arguments else "--help"
    if name in commands:
        commands[name]([f"{program} {name}", *arguments[1:]])
    else:
        run(unknown, new_flags(), usage, [program, name])


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C behind an error: an extension that it stops in loading raises ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def override(config: ConfigDict, own: flags.FlagValues, argv: list[str]) -> None:
    """Applies `--config.KEY=VALUE`; whatever else is left over is a mistake."""
    try:
        positional = config_flags.override(config, argv)[1:]
    except flags.UnrecognizedFlagError as error:
        keys = (f"--config.{key}" for key in config_flags.keys(config))
        advice = suggest(f"--{error.flagname}", [*(f"--{name}" for name in own), *keys])
        raise ConfigError(f"{error.flagvalue}: no such flag{advice}") from None
    if positional:
        raise ConfigError(f"{positional[0]}: not expected; flags are --name=value")


def inherit(config: ConfigDict) -> bool:
    """Takes the settings of the run in `init_from`, if `init_settings` asks; returns whether.

    Raises:
      ConfigError: there is no such run.
    """
    if not config.init_settings:
        return False
    if not config.init_from:
        raise ConfigError(
            "init_from='': this config has the model of another run; name it,"
            " --config.init_from=WORKDIR"
        )
    other = saved(re.sub(r":\d+$", "", config.init_from), field="--config.init_from")
    config.model = other.model
    if config.attention.name == "dense":
        config.attention = other.attention
    else:
        from sparseformer_jax import registry

        registry.adopt("attention", config.attention, other.attention, other.model.num_layers)
    for key in ("tokenizer", "bos_token", "eos_token", "stop_tokens"):
        config.data[key] = other.data[key]
    config.init_settings = False
    return True


def chosen(own: flags.FlagValues) -> ConfigDict:
    """Returns the config that `--config` names, or else that which training wrote.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    if own.config:
        return config_flags.load(own.config)
    try:
        return saved(own.workdir)
    except ConfigError as error:
        raise ConfigError(f"{error}; or pass --config") from None


def saved(workdir: str, field: str = "--workdir") -> ConfigDict:
    """Returns the config that training wrote into a workdir.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    from sparseformer_jax.config import completed, from_json

    file = pathlib.Path(workdir) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{field}={workdir}: has no config.json; name the folder of a run")
    try:
        return completed(from_json(file.read_bytes()))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}; train on: it is written anew") from None


def _check_devices() -> None:
    """Refuses a number of simulated devices that JAX would refuse while it is imported."""
    number = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not re.fullmatch(r"-1|[1-9]\d{0,3}", number):
        raise ConfigError(f"JAX_NUM_CPU_DEVICES={number}: must be a number from 1 to 9999")


def order_sums(config: ConfigDict) -> None:
    """Has XLA add in one order on a GPU, before JAX starts; elsewhere it always does."""
    section = config.get("train")  # anything, as the config is not checked yet
    if isinstance(section, ConfigDict) and not section.get("deterministic", True):
        return
    is_told = "deterministic_ops" in os.environ.get("XLA_FLAGS", "")
    if not is_told and os.environ.get("JAX_PLATFORMS") != "cpu":
        _set_xla_flag("--xla_gpu_exclude_nondeterministic_ops=true")


def order_collectives() -> None:
    """Has simulated devices meet in one order: else they may wait for each other for ever."""
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
    is_simulated = os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1"
    if is_simulated and flag not in os.environ.get("XLA_FLAGS", ""):
        _set_xla_flag(f"{flag}=false")


def _set_xla_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".lstrip()


def start_jax(own: flags.FlagValues) -> None:
    """Turns on the persistent compilation cache, connects the processes, finds the devices."""
    order_collectives()
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


def validate(config: ConfigDict) -> None:
    """Checks a config, and locks it."""
    from sparseformer_jax.config import validate

    validate(config)
    config.lock()


def require(own: flags.FlagValues, argv: list[str], name: str) -> None:
    """Refuses a flag that is missing, and first one that may be it, mistyped."""
    if own[name].value:
        return
    for argument in argv[1:]:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not flag.startswith(("--config.", "--noconfig.")):
            raise ConfigError(f"{argument}: no such flag{suggest(flag, [f'--{x}' for x in own])}")
    raise ConfigError(f"--{name}=...: missing; the {own[name].help}")


def new_flags() -> flags.FlagValues:
    """Returns flags of a command, so far `--help` alone."""
    own = flags.FlagValues()
    own.set_gnu_getopt()
    switch(own, "help", "show this")
    return own


def text(own: flags.FlagValues, name: str, help_text: str) -> None:
    """Adds a flag of any text; None unless given."""
    flags.DEFINE_string(name, None, help_text, own)


def unescaped(value: str) -> str:
    r"""Returns a flag's text with new lines and tabs for \n and \t, which a shell hardly passes."""
    return value.replace(r"\n", "\n").replace(r"\t", "\t")


def number(own: flags.FlagValues, name: str, help_text: str) -> None:
    """Adds a flag of a number from 0; None unless given."""
    flags.DEFINE_integer(name, None, help_text, 0, flag_values=own)


def switch(own: flags.FlagValues, name: str, help_text: str) -> None:
    """Adds a flag that is off unless given."""
    flags.DEFINE_boolean(name, False, help_text, own)


def distributed(own: flags.FlagValues) -> None:
    """Adds the flags that join processes on several hosts."""
    text(own, "coordinator_address", "HOST:PORT; with the next two, for many hosts")
    number(own, "num_processes", "processes in all; default: found in the cluster")
    number(own, "process_id", "number of this process, from 0")


def _flag_list(own: flags.FlagValues) -> str:
    lines = []
    for name in own:
        value = "" if own[name].boolean else "=..."
        lines.append(f"  {f'--{name}{value}':<27}{own[name].help}\n")
    return "".join(lines)
