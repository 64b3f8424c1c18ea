"""The commands: train, evaluate and sample, from flags, with one line for a user's mistake."""

import io
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import command, config_flags
from sparseformer_jax.checks import ConfigError

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
  python -m sparseformer_jax.generate --workdir=/tmp/run --prompt_file=notes.txt --top_p=0.9
  python -m sparseformer_jax.generate --workdir=/tmp/run --prompt="Q: " --stop='\\n' --stop="A:"
  echo -n "def " | python -m sparseformer_jax.generate --workdir=/tmp/run --prompt_file=-

An installed package has the same command as `sparseformer-generate`.
"""

_PLOT_USAGE = """\
Draws a run: loss, evaluation, learning rate and speed over steps.

  python -m sparseformer_jax.evaluation.plots --workdir=/tmp/run
  python -m sparseformer_jax.evaluation.plots --workdir=/tmp/run --output=loss.png
"""

_RETRIEVE_USAGE = """\
Asks a trained model for what stands in a text, by the text's length and the depth it stands at.

  python -m sparseformer_jax.evaluation.retrieval --workdir=/tmp/run --output=/tmp/retrieval
  python -m sparseformer_jax.evaluation.retrieval --workdir=/tmp/run --output=/tmp/retrieval \\
      --tasks=passkey,needle --lengths=192,256 --depths=9 --examples=2

Tasks, those of RULER (arXiv 2404.06654):
  passkey            a number in a text that repeats itself
  needle             the number of a thing in a text of many sentences
  multi_key          the same, among the numbers of other things
  variable_tracking  all variables that a chain of assignments gives a value
  common_words       the words of a list that occur most often

Writes retrieval.json and a picture of each task into --output.
"""


def train(argv: Sequence[str] | None = None) -> None:
    """Runs the training command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "config", "config file, FILE.py or FILE.py:ARGUMENT")
    command.text(own, "workdir", "folder of checkpoints and metrics; made if missing")
    command.number(own, "step", "checkpoint to go on from; later ones are left behind")
    command.switch(own, "describe", "print config, size, FLOPs and memory; do not train")
    command.switch(own, "accept_changed_config", "resume though the config has changed")
    command.switch(own, "ignore_memory_estimate", "train though memory seems too small")
    command.distributed(own)
    command.run(_train, own, _TRAIN_USAGE, sys.argv if argv is None else argv)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Runs the evaluation command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training wrote")
    command.text(own, "config", "config file; default: the config saved in the workdir")
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.text(own, "split", "train, validation or test; default: the config's")
    command.text(own, "output", "JSON of the results; default: eval_SPLIT_STEP[_DIGEST].json there")
    command.text(own, "plots", "folder of pictures: kept pairs by layer and head, loss by position")
    command.distributed(own)
    command.run(_evaluate, own, _EVAL_USAGE, sys.argv if argv is None else argv)


def sample(argv: Sequence[str] | None = None) -> None:
    """Runs the sampling command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training wrote")
    command.text(own, "config", "config file; default: the config saved in the workdir")
    flags.DEFINE_string("prompt", "", "text to continue", own)
    flags.DEFINE_string("prompt_file", "", "file of the text to continue; -: standard input", own)
    flags.DEFINE_integer("num_tokens", 256, "tokens to sample at most", 1, flag_values=own)
    flags.DEFINE_multi_string(
        "stop", [], r"text to end before, \n for a new line; may be repeated", own
    )
    flags.DEFINE_float("temperature", 0.8, "of the softmax; 0: the likeliest", 0.0, flag_values=own)
    flags.DEFINE_integer("top_k", 0, "draw from so many of the likeliest; 0: all", flag_values=own)
    flags.DEFINE_float(
        "top_p", 1.0, "draw from the likeliest with this probability", flag_values=own
    )
    flags.DEFINE_integer("seed", 0, "of the sampling", 0, flag_values=own)
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.run(_sample, own, _SAMPLE_USAGE, sys.argv if argv is None else argv)


def plot(argv: Sequence[str] | None = None) -> None:
    """Runs the command that draws a run; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training wrote")
    command.text(own, "output", "PNG file; default: loss.png there")
    command.run(_plot, own, _PLOT_USAGE, sys.argv if argv is None else argv)


def retrieve(argv: Sequence[str] | None = None) -> None:
    """Runs the command that evaluates retrieval; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training wrote")
    command.text(own, "output", "folder of the results; made if missing")
    command.text(own, "config", "config file; default: the config saved in the workdir")
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.text(own, "tasks", "which, with commas between them; default: all")
    command.text(own, "lengths", "prompt and answer, in tokens; default: data.seq_len")
    flags.DEFINE_integer(
        "depths", 5, "places in the text, from start to end; default: 5", flag_values=own
    )
    flags.DEFINE_integer(
        "examples", 4, "prompts of each length and depth; default: 4", flag_values=own
    )
    flags.DEFINE_integer("seed", 0, "of the prompts", 0, flag_values=own)
    command.run(_retrieve, own, _RETRIEVE_USAGE, sys.argv if argv is None else argv)


def _train(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "config")
    if not own.describe:
        command.require(own, argv, "workdir")
    config = config_flags.load(own.config)
    command.override(config, own, argv)
    if command.inherit(config):
        command.override(config, own, argv)
    command.order_sums(config)
    # Imported late, here and below: a mistyped flag is told at once.
    command.start_jax(own)
    command.validate(config)
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
    command.require(own, argv, "workdir")
    config = command.chosen(own)
    command.override(config, own, argv)
    if own.split:
        config.eval.split = own.split
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax import mesh
    from sparseformer_jax.evaluation import perplexity, results
    from sparseformer_jax.training.by_layer import without_layers

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
        print(json.dumps(without_layers(found), indent=2))
        for line in results.warnings(found):
            print(line, file=sys.stderr)
        print(results.write(output or workdir / results.file_name(found), found), file=sys.stderr)


def _sample(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "workdir")
    config = command.chosen(own)
    command.override(config, own, argv)
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.generation.choice import Choice
    from sparseformer_jax.generation.sampling import Sampler

    choice = Choice(own.temperature, own.top_k, own.top_p)
    workdir, prompt = pathlib.Path(own.workdir), _prompt(own)
    stop = [command.unescaped(text) for text in own.stop]
    if "" in stop:
        raise ConfigError("--stop=: empty; name a text, or leave it out")
    sampler = Sampler(config, workdir, step=own.step, choice=choice, seed=own.seed)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every character
        sys.stdout.reconfigure(errors="replace")
    pieces = sampler.stream(prompt, own.num_tokens, stop)
    for piece in itertools.chain([prompt], pieces, ["\n"]):
        sys.stdout.write(piece)
        sys.stdout.flush()


def _prompt(own: flags.FlagValues) -> str:
    """The text to continue."""
    if own.prompt and own.prompt_file:
        raise ConfigError(f"--prompt_file={own.prompt_file}: goes without --prompt; leave one out")
    text = own.prompt
    if own.prompt_file == "-":
        text = sys.stdin.buffer.read().decode(errors="surrogateescape")
    elif own.prompt_file:
        text = pathlib.Path(own.prompt_file).read_bytes().decode(errors="surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that were no UTF-8 are surrogates
        name = f"--prompt_file={own.prompt_file}" if own.prompt_file else f"--prompt={text!a}"
        raise ConfigError(f"{name}: not UTF-8 at character {error.start}; convert it") from None
    return text


def _plot(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "workdir")
    command.override(ConfigDict(), own, argv)
    from sparseformer_jax.evaluation import plots, results

    output = pathlib.Path(own.output) if own.output else None
    if output is not None:
        results.check_folder("--output", output)
    print(plots.draw(pathlib.Path(own.workdir), output))


def _retrieve(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "workdir")
    command.require(own, argv, "output")
    config = command.chosen(own)
    command.override(config, own, argv)
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.evaluation import pictures
    from sparseformer_jax.evaluation.retrieval import accuracy, tasks

    settings = accuracy.Settings(
        accuracy.parse_lengths(own.lengths) if own.lengths else [config.data.seq_len],
        own.tasks.split(",") if own.tasks else tasks.TASKS,
        num_depths=own.depths,
        num_examples=own.examples,
        seed=own.seed,
    )
    output = pathlib.Path(own.output)
    pictures.prepare(output, "--output")
    found = accuracy.evaluate_checkpoint(config, pathlib.Path(own.workdir), settings, step=own.step)
    print(accuracy.table(found))
    print(accuracy.write(output, found), file=sys.stderr)
