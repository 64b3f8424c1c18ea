"""Perplexity of plain text in windows, as published figures of pretrained models are measured.

    python -m sparseformer_jax.evaluation.windows --workdir=/tmp/model --files=test.txt

The text of a file is one sequence of tokens. It is cut into windows, and within each every token
but the first is predicted from those before it in the window. Where windows overlap, by a stride,
a token is predicted once, in the first window that holds it: from at least size - stride tokens.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import command, mesh
from sparseformer_jax import config as config_lib
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError, NonFiniteError, check_choice
from sparseformer_jax.data import Batch, Tokenizer
from sparseformer_jax.evaluation.perplexity import make_eval_step
from sparseformer_jax.training.batches import place
from sparseformer_jax.training.metrics import perplexity
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef

_BOS = ("none", "text", "window")

_USAGE = """\
Perplexity of text files in windows, as it is published of pretrained models.

  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=test.txt
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=a.txt,b.txt \\
      --window=2048 --num_windows=8 --bos=window
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=test.txt --stride=512
"""


@dataclasses.dataclass(frozen=True)
class Windows:
    """How text is cut.

    Attributes:
      size: tokens of a window.
      number: windows of each file, the first ones; 0: all. The last may be shorter.
      bos: where the tokenizer's first token stands: "none"; "text", it is the first of each
        file; "window", it is seen before every window, so the same tokens are predicted.
      stride: tokens from one window's start to the next; 0: size, they do not overlap.

    Raises:
      ConfigError: a window predicts nothing, windows leave tokens out, or a value is none of
        its choices.
    """

    size: int = 1024
    number: int = 0
    bos: str = "none"
    stride: int = 0

    def __post_init__(self) -> None:
        check_choice("--bos", self.bos, _BOS)
        if self.size < 2:
            raise ConfigError(f"--window={self.size}: predicts nothing; take more tokens")

        if self.stride > self.size:
            raise ConfigError(
                f"--stride={self.stride}: leaves out tokens between windows; take at most "
                f"--window={self.size}"
            )

    def cut(self, ids: np.ndarray, bos_id: int | None) -> list["Window"]:
        """Returns the windows of a text's tokens that predict anything."""
        if self.bos == "text":
            ids = np.concatenate([np.array([bos_id], ids.dtype), ids])
        stride = self.stride or self.size
        starts = range(0, len(ids), stride)[: self.number or None]
        windows = []
        for start in starts:
            seen = 1 if stride == self.size or not start else self.size - stride
            windows.append(Window(ids[start : start + self.size], seen))
        return [window for window in windows if len(window.tokens) > window.seen]


@dataclasses.dataclass(frozen=True)
class Window:
    """Tokens of which the first `seen` are not predicted."""

    tokens: np.ndarray
    seen: int


def evaluate(
    config: ConfigDict,
    workdir: Path,
    files: Sequence[Path],
    windows: Windows,
    *,
    step: int | None = None,
) -> dict[str, Any]:
    """Returns loss (nats per predicted token), perplexity, bits_per_byte, tokens, and windows.

        bits_per_byte = loss / ln 2 * tokens / bytes

    with tokens per byte counted over the whole texts. Tokens weigh alike, so neither the batch
    size nor the mesh changes the figures.

    Args:
      config: of the run; `eval.batch_size` windows are computed at a time.
      workdir: of the run.
      files: UTF-8 text.
      windows: how it is cut.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: a file cannot be read or predicts nothing, the tokenizer has no token to
        begin with, or there is no such checkpoint.
      NonFiniteError: the loss is not a finite number.
    """
    tokenizer = make_tokenizer(config)
    pieces, tokens_per_byte = _pieces(files, windows, tokenizer, config)
    start = [tokenizer.bos_id] if windows.bos == "window" else []
    with jax.set_mesh(mesh.make_mesh(config_lib.resolve_mesh(config.mesh, jax.device_count()))):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir, step)
        compute = jax.jit(make_eval_step(model_def))
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec("batch", "seq"))
        batches = list(_batches(pieces, windows.size, start, config.eval.batch_size))
        nll = tokens = 0.0
        quiet = not (mesh.is_primary() and sys.stderr.isatty())
        for batch in tqdm(batches, desc="evaluate", unit="batch", leave=False, disable=quiet):
            sums = jax.device_get(compute(state, place(batch, sharding)))
            nll += float(np.sum(sums["nll"], dtype=np.float64))
            tokens += float(np.sum(sums["tokens"], dtype=np.float64))
        step = int(state.step)
    loss = nll / tokens
    if not math.isfinite(loss):
        raise NonFiniteError(f"evaluation loss is {loss} over {tokens:.0f} tokens")
    return {
        "step": step,
        "files": [str(file) for file in files],
        **dataclasses.asdict(windows),
        "windows": len(pieces),
        "tokens": int(tokens),
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


def _pieces(
    files: Sequence[Path], windows: Windows, tokenizer: Tokenizer, config: ConfigDict
) -> tuple[list[Window], float]:
    """The windows of all files, and the tokens of their texts over the bytes."""
    bos_id = tokenizer.bos_id
    if windows.bos != "none" and bos_id is None:
        raise ConfigError(
            f"--bos={windows.bos}: data.bos_token={config.data.bos_token!r} names no token; "
            "set --config.data.bos_token"
        )
    pieces, num_tokens, num_bytes = [], 0, 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise ConfigError(f"--files={file}: cannot be read: {reason}") from None
        ids = tokenizer.encode(text)
        found = windows.cut(ids, bos_id)
        if not found:
            raise ConfigError(f"--files={file}: too short to predict a token of")
        pieces += found
        num_tokens, num_bytes = num_tokens + len(ids), num_bytes + len(text.encode())
    return pieces, num_tokens / num_bytes


def _batches(
    pieces: Sequence[Window], size: int, start: Sequence[int | None], batch_size: int
) -> Iterator[Batch]:
    """Yields this process's rows of batches of one shape; what fills them has weight 0.

    `start` stands before each window.
    """
    rows = batch_size // jax.process_count()
    for batch in range(0, len(pieces), batch_size):
        first = batch + jax.process_index() * rows
        tokens = np.zeros((rows, size + 1), np.int32)
        firsts, ends = np.zeros((2, rows, 1), np.int32)
        for row, piece in enumerate(pieces[first : first + rows]):
            sequence = [*start, *piece.tokens]
            tokens[row, : len(sequence)] = sequence
            firsts[row], ends[row] = len(start) + piece.seen - 1, len(sequence) - 1
        positions = np.broadcast_to(np.arange(size, dtype=np.int32), (rows, size)).copy()
        yield {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": positions,
            "segment_ids": np.zeros_like(positions),
            "weights": ((positions >= firsts) & (positions < ends)).astype(np.float32),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training or an import wrote")
    command.text(own, "files", "text files, with commas between them")
    flags.DEFINE_integer("window", 1024, "tokens of a window", 1, flag_values=own)
    flags.DEFINE_integer("stride", 0, "from window to window; 0: no overlap", 0, flag_values=own)
    flags.DEFINE_integer("num_windows", 0, "of each file, the first; 0: all", 0, flag_values=own)
    flags.DEFINE_string("bos", "none", "none; text or window: which begin with the token", own)
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.run(_main, own, _USAGE, sys.argv if argv is None else argv)


def _main(own: flags.FlagValues, argv: list[str]) -> None:
    for name in ("workdir", "files"):
        command.require(own, argv, name)
    config = command.saved(own.workdir)
    command.override(config, own, argv)
    command.start_jax(own)
    command.validate(config)
    files = [Path(name) for name in own.files.split(",")]
    windows = Windows(own.window, own.num_windows, own.bos, own.stride)
    found = evaluate(config, Path(own.workdir), files, windows, step=own.step)
    if mesh.is_primary():
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
