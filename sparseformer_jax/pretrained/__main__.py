"""The commands: `python -m sparseformer_jax.pretrained import` and `export`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import command
from sparseformer_jax.checks import ConfigError

_USAGE = """\
Pretrained models in and out, without network and without pickles.

  python -m sparseformer_jax.pretrained import SOURCE --workdir=/tmp/model
  python -m sparseformer_jax.pretrained export --workdir=/tmp/model --out=/tmp/folder

Each tells more with --help.
"""

_IMPORT_USAGE = """\
Makes a workdir of a pretrained model: Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text), GPT-Neo.

  python -m sparseformer_jax.pretrained import SOURCE --workdir=/tmp/model

SOURCE is a folder as transformers saves it, with config.json, tokenizer.json and safetensors,
or a GGUF file (F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K). Of a split one give the
first file; of one that was cut into parts, all parts in order. What comes next:

  python eval.py --workdir=/tmp/model --config.data.files=test.txt
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/model --files=test.txt
  python -m sparseformer_jax.generate --workdir=/tmp/model --prompt="..."
  python -m sparseformer_jax.pretrained export --workdir=/tmp/model --out=/tmp/folder

and --config.init_from=/tmp/model has a run start with its parameters. With --config.mesh.fsdp=8
tensors go in shards to eight devices as they are read.
"""

_EXPORT_USAGE = """\
Writes a checkpoint as a folder that transformers opens, with the same logits.

  python -m sparseformer_jax.pretrained export --workdir=/tmp/model --out=/tmp/folder
  python -m sparseformer_jax.pretrained export --workdir=/tmp/run --out=/tmp/folder \\
      --step=500 --dtype=bfloat16

Weights that sparsity drops are zero, in their places, and masks.safetensors holds the masks, at
most a bit a weight. Attention that transformers does not have is refused.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    command.run_one_of(_COMMANDS, _USAGE, sys.argv if argv is None else argv)


def _import(argv: Sequence[str]) -> None:
    own = command.new_flags()
    command.text(own, "workdir", "folder to make, of the imported model")
    command.run(_run_import, own, _IMPORT_USAGE + "\n" + command.CONFIG_HELP, argv)


def _run_import(own: flags.FlagValues, argv: list[str]) -> None:
    paths = [Path(argument) for argument in argv[1:] if not argument.startswith("--")]
    flags_left = [argument for argument in argv[1:] if argument.startswith("--")]
    command.require(own, argv, "workdir")
    if not paths:
        raise ConfigError("SOURCE: missing; a folder with config.json, or a GGUF file")
    command.start_jax(own)
    from sparseformer_jax.pretrained import importing

    def override(config: ConfigDict) -> None:
        command.override(config, own, [argv[0], *flags_left])

    print(importing.import_model(paths, Path(own.workdir), override))


def _export(argv: Sequence[str]) -> None:
    own = command.new_flags()
    command.text(own, "workdir", "folder that training or an import wrote")
    command.text(own, "out", "folder to make, for transformers")
    command.number(own, "step", "checkpoint to export; default: the latest")
    flags.DEFINE_string("dtype", "float32", "of the weights: float32, bfloat16 or float16", own)
    command.run(_run_export, own, _EXPORT_USAGE, argv)


def _run_export(own: flags.FlagValues, argv: list[str]) -> None:
    for name in ("workdir", "out"):
        command.require(own, argv, name)
    config = command.saved(own.workdir)
    command.override(config, own, argv)
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.pretrained import exporting

    folder, workdir = Path(own.out), Path(own.workdir)
    print(exporting.export_model(config, workdir, folder, step=own.step, dtype=own.dtype))


_COMMANDS = {"import": _import, "export": _export}

if __name__ == "__main__":
    main()
