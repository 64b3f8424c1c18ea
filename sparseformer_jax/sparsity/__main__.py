"""The commands: `python -m sparseformer_jax.sparsity prune`, `report` and `bake`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import command

_USAGE = """\
Sparse weights of trained models.

  python -m sparseformer_jax.sparsity prune --workdir=/tmp/model --method=wanda --pattern=2:4 \\
      --out=/tmp/sparse
  python -m sparseformer_jax.sparsity report --workdir=/tmp/sparse
  python -m sparseformer_jax.sparsity bake --workdir=/tmp/sparse --out=/tmp/dense

Each tells more with --help.
"""

_PRUNE_USAGE = """\
Makes of a dense run one with masks, without training.

  python -m sparseformer_jax.sparsity prune --workdir=/tmp/model --method=magnitude --pattern=2:4 \\
      --out=/tmp/sparse
  python -m sparseformer_jax.sparsity prune --workdir=/tmp/model --method=wanda --pattern=0.5 \\
      --dsnot --targets=ff --out=/tmp/sparse --config.data.files=text.jsonl
  python -m sparseformer_jax.sparsity prune --workdir=/tmp/model --method=sparsegpt \\
      --update_weights --pattern=2:4 --out=/tmp/sparse --num_samples=64 --seq_len=512

Methods: magnitude, which reads no text, wanda, ria, and sparsegpt, which may update the weights it
keeps. --dsnot exchanges weights of their masks. --permute reorders the hidden units of MLPs, which
leaves the model as it is, so that groups of n:m share the large ones. A pattern is n:m, n of every
m along what a product sums over, or the kept fraction. What comes next:

  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/sparse --files=test.txt
  python -m sparseformer_jax.sparsity report --workdir=/tmp/sparse

and configs/fixed.py:pretrained with --config.init_from=/tmp/sparse trains what is kept, where that
is not 2:4 of all projections with --config.sparsity.targets=all, or those pruned, as in --targets.
--config.data.* say what text is read; the new run keeps the config of the old one.
"""

_REPORT_USAGE = """\
Tells what the masks of a run are: kept fraction and n:m of each projection, and the entries at
which they differ from masks of the largest weights and of another run.

  python -m sparseformer_jax.sparsity report --workdir=/tmp/sparse
  python -m sparseformer_jax.sparsity report --workdir=/tmp/sparse --prior=/tmp/other \\
      --output=/tmp/report

Writes sparsity.json and sparsity.png into --output.
"""

_BAKE_USAGE = """\
Writes a run with sparse weights as a dense one, with zeros where its masks drop them.

  python -m sparseformer_jax.sparsity bake --workdir=/tmp/sparse --out=/tmp/dense
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    command.run_one_of(_COMMANDS, _USAGE, sys.argv if argv is None else argv)


def _prune(argv: Sequence[str]) -> None:
    own = command.new_flags()
    command.text(own, "workdir", "folder that training or an import wrote")
    command.text(own, "method", "magnitude, wanda, sparsegpt or ria")
    command.text(own, "pattern", "n:m, as 2:4, or the kept fraction, as 0.5")
    command.text(own, "out", "folder to make, a workdir of the same step")
    flags.DEFINE_string("targets", "all", "all, ff, qkv or regexes on names, with commas", own)
    command.switch(own, "update_weights", "let sparsegpt change the weights it keeps")
    command.switch(own, "dsnot", "exchange weights of the mask afterwards")
    command.switch(own, "permute", "with ria and n:m, deal hidden units to groups anew")
    command.number(own, "step", "checkpoint to prune; default: the latest")
    flags.DEFINE_string("split", "train", "of the text", own)
    flags.DEFINE_integer("num_samples", 128, "examples of text", 1, flag_values=own)
    command.number(own, "seq_len", "tokens of each; default: data.seq_len")
    command.number(own, "seed", "of their draw; default: the config's")
    command.run(_run_prune, own, _PRUNE_USAGE + "\n" + command.CONFIG_HELP, argv)


def _run_prune(own: flags.FlagValues, argv: list[str]) -> None:
    for name in ("workdir", "method", "pattern", "out"):
        command.require(own, argv, name)
    config, overridden = command.saved(own.workdir), command.saved(own.workdir)
    command.override(overridden, own, argv)
    if own.seq_len is not None:
        overridden.data.seq_len = own.seq_len
    command.start_jax(own)
    command.validate(overridden)
    from sparseformer_jax.sparsity import one_shot, workdirs
    from sparseformer_jax.sparsity._selection import parse

    recipe = one_shot.Recipe(
        own.method,
        parse(own.pattern),
        update_weights=own.update_weights,
        dsnot=own.dsnot,
        permute=own.permute,
    )
    seed = config.seed if own.seed is None else own.seed
    text = workdirs.Text(own.split, own.num_samples, seed)
    targets = tuple(own.targets.split(","))
    print(
        workdirs.prune(
            config,
            Path(own.workdir),
            Path(own.out),
            recipe,
            targets,
            text=text,
            overridden=overridden,
            step=own.step,
        )
    )


def _report(argv: Sequence[str]) -> None:
    own = command.new_flags()
    command.text(own, "workdir", "folder of a run with sparse weights")
    command.text(own, "prior", "WORKDIR or WORKDIR:STEP of a run to compare masks with")
    command.text(own, "output", "folder of the results; default: the workdir")
    command.number(own, "step", "checkpoint to tell of; default: the latest")
    command.run(_run_report, own, _REPORT_USAGE, argv)


def _run_report(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "workdir")
    config, workdir = command.saved(own.workdir), Path(own.workdir)
    command.override(ConfigDict(), own, argv)
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.evaluation import pictures
    from sparseformer_jax.sparsity import report

    output = Path(own.output) if own.output else workdir
    pictures.prepare(output, "--output")
    found = report.measure(config, workdir, step=own.step, prior=own.prior or "")
    print(report.table(found))
    title = f"{config.sparsity.name}, step {found['step']} of {workdir.absolute().name}"
    print(report.write(output, found, title), file=sys.stderr)


def _bake(argv: Sequence[str]) -> None:
    own = command.new_flags()
    command.text(own, "workdir", "folder of a run with sparse weights")
    command.text(own, "out", "folder to make, a workdir of the same step")
    command.number(own, "step", "checkpoint to take; default: the latest")
    command.run(_run_bake, own, _BAKE_USAGE, argv)


def _run_bake(own: flags.FlagValues, argv: list[str]) -> None:
    for name in ("workdir", "out"):
        command.require(own, argv, name)
    config = command.saved(own.workdir)
    command.override(ConfigDict(), own, argv)
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.sparsity import workdirs

    print(workdirs.bake(config, Path(own.workdir), Path(own.out), own.step))


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "prune": _prune,
    "report": _report,
    "bake": _bake,
}

if __name__ == "__main__":
    main()
