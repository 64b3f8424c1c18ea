"""Perplexity of text in windows, as published figures of pretrained models are measured.

    python -m sparseformer_jax.evaluation.windows --workdir=/tmp/model --files=test.txt

A document is one sequence of tokens: a file, a JSON line, an example of a tfds data set, or all of
them joined. It is cut into windows, and within each every token but the first is predicted from
those before it in the window. Where windows overlap, by a stride, a token is predicted once, in the
first window that holds it: from at least size - stride tokens.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from sparseformer_jax import command, mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.data import Tokenizer
from sparseformer_jax.evaluation import texts
from sparseformer_jax.evaluation.scoring import Scorer, Window
from sparseformer_jax.training.metrics import perplexity

_BOS = ("none", "text", "window")

_USAGE = """\
Perplexity of text in windows, as it is published of pretrained models.

  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=test.txt
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=a.txt,b.jsonl.gz \\
      --window=2048 --num_windows=8 --bos=window
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --files=test.txt --stride=512
  python -m sparseformer_jax.evaluation.windows --workdir=/tmp/smollm2 --split=test \\
      --config.data.tfds_name=wiki40b/en --join='\\n\\n'

Every document is cut into windows of its own, and JSON lines are documents, with their text in
--config.data.text_field; --join makes one document of all. Prints JSON, and a table on stderr.
"""


@dataclasses.dataclass(frozen=True)
class Windows:
    """How text is cut.

    Attributes:
      size: tokens of a window.
      number: windows of each document, the first ones; 0: all. The last may be shorter.
      bos: where the tokenizer's first token stands: "none"; "text", it is the first of each
        document; "window", it is seen before every window, so the same tokens are predicted.
      stride: tokens from one window's start to the next; 0: size, they do not overlap.
      join: what stands between documents that are cut as one; None: each is cut alone.

    Raises:
      ConfigError: a window predicts nothing, windows leave tokens out, or a value is none of
        its choices.
    """

    size: int = 1024
    number: int = 0
    bos: str = "none"
    stride: int = 0
    join: str | None = None

    def __post_init__(self) -> None:
        check_choice("--bos", self.bos, _BOS)
        if self.size < 2:
            raise ConfigError(f"--window={self.size}: predicts nothing; take more tokens")
        if self.stride > self.size:
            raise ConfigError(
                f"--stride={self.stride}: leaves out tokens between windows; take at most "
                f"--window={self.size}"
            )

    def cut(self, ids: np.ndarray, bos_id: int | None) -> list[Window]:
        """Returns the windows of a document's tokens that predict anything."""
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
class _Text:
    """Windows of some documents, and how long those are as a whole."""

    windows: list[Window]
    num_documents: int
    num_tokens: int
    num_bytes: int


def evaluate(
    config: ConfigDict,
    workdir: Path,
    documents: Mapping[str, Sequence[str]],
    windows: Windows,
    *,
    step: int | None = None,
) -> dict[str, Any]:
    """Returns loss (nats per predicted token), perplexity, bits_per_byte, and what was predicted.

        bits_per_byte = loss / ln 2 * tokens / bytes

    with tokens per byte counted over the whole documents. Tokens weigh alike, so neither the batch
    size nor the mesh changes the figures. Of several texts "texts" has those of each.

    Args:
      config: of the run; `eval.batch_size` windows are computed at a time.
      workdir: of the run.
      documents: of each text, by a name.
      windows: how they are cut.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: there is nothing to predict, the tokenizer has no token to begin with, or there
        is no such checkpoint.
      NonFiniteError: a loss is not a finite number.
    """
    tokenizer = make_tokenizer(config)
    if windows.bos != "none" and tokenizer.bos_id is None:
        raise ConfigError(
            f"--bos={windows.bos}: data.bos_token={config.data.bos_token!r} names no token; "
            "set --config.data.bos_token"
        )
    rows = config.model.max_positions
    if config.model.position == "learned" and windows.size > rows:
        raise ConfigError(f"--window={windows.size}: the model has {rows} positions; take no more")
    if windows.join is not None:
        whole = windows.join.join(text for of_name in documents.values() for text in of_name)
        documents = {",".join(documents): [whole]}
    cut = {name: _cut(of_name, windows, tokenizer) for name, of_name in documents.items()}
    for name, text in cut.items():
        if not text.windows:
            raise ConfigError(f"{name}: too short to predict a token of")
    scorer = Scorer(config, workdir, step)
    every = [window for text in cut.values() for window in text.windows]
    nll = scorer(every, lambda _: windows.size).nll
    ends = np.cumsum([len(text.windows) for text in cut.values()])
    by_text = zip(cut.values(), np.split(nll, ends[:-1]), strict=True)
    of_texts = [_figures([text], own) for text, own in by_text]
    several = {"texts": dict(zip(cut, of_texts, strict=True))} if len(cut) > 1 else {}
    return {
        "step": scorer.step,
        "text": ",".join(cut),
        **dataclasses.asdict(windows),
        **_figures(list(cut.values()), nll),
        **several,
    }


def _cut(documents: Sequence[str], windows: Windows, tokenizer: Tokenizer) -> _Text:
    start = [tokenizer.bos_id] if windows.bos == "window" else []
    encoded = tokenizer.encode_batch(documents)
    found = [window for ids in encoded for window in windows.cut(ids, tokenizer.bos_id)]
    return _Text(
        [Window(np.array([*start, *x.tokens]), len(start) + x.seen) for x in found],
        len(documents),
        sum(map(len, encoded)),
        sum(len(text.encode()) for text in documents),
    )


def _figures(texts: Sequence[_Text], nll: np.ndarray) -> dict[str, Any]:
    windows = [window for text in texts for window in text.windows]
    num_tokens = sum(len(window.tokens) - window.seen for window in windows)
    loss = float(nll.sum()) / num_tokens
    tokens_per_byte = sum(x.num_tokens for x in texts) / sum(x.num_bytes for x in texts)
    return {
        "documents": sum(text.num_documents for text in texts),
        "windows": len(windows),
        "tokens": num_tokens,
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
    }


_COLUMNS = {
    "documents": "{:d}",
    "windows": "{:d}",
    "tokens": "{:d}",
    "loss": "{:.4f}",
    "perplexity": "{:.4f}",
    "bits_per_byte": "{:.4f}",
}


def table(found: Mapping[str, Any]) -> str:
    """Returns the figures as text: a row a text, and of several one of all."""
    rows = dict(found.get("texts", {}))
    rows["all" if rows else found["text"]] = found
    width = max(map(len, ["text", *rows]))
    lines = [["text", *(name.replace("_", " ") for name in _COLUMNS)]]
    for name, row in rows.items():
        lines.append([name, *(form.format(row[key]) for key, form in _COLUMNS.items())])
    return "\n".join(
        "".join([name.ljust(width), *(cell.rjust(15) for cell in cells)]) for name, *cells in lines
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training or an import wrote")
    command.text(own, "files", "text files, with commas between them; or")
    command.text(own, "split", "of the documents of --config.data.files or .tfds_name")
    flags.DEFINE_integer("window", 1024, "tokens of a window", 1, flag_values=own)
    flags.DEFINE_integer("stride", 0, "from window to window; 0: no overlap", 0, flag_values=own)
    flags.DEFINE_integer("num_windows", 0, "of each document; 0: all", 0, flag_values=own)
    flags.DEFINE_string("bos", "none", "none; text or window: which begin with the token", own)
    command.text(own, "join", r"make one document of all, with this between, \n for a new line")
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.run(_main, own, _USAGE, sys.argv if argv is None else argv)


def _main(own: flags.FlagValues, argv: list[str]) -> None:
    command.require(own, argv, "workdir")
    if not own.split:
        command.require(own, argv, "files")
    elif own.files:
        raise ConfigError(f"--split={own.split}: goes without --files; leave one out")
    config = command.saved(own.workdir)
    command.override(config, own, argv)
    command.start_jax(own)
    command.validate(config)
    join = None if own.join is None else command.unescaped(own.join)
    windows = Windows(own.window, own.num_windows, own.bos, own.stride, join)
    if own.split:
        documents = texts.of_split(config.data, own.split)
    else:
        documents = texts.of_files(config.data, [Path(name) for name in own.files.split(",")])
    found = evaluate(config, Path(own.workdir), documents, windows, step=own.step)
    if mesh.is_primary():
        print(table(found), file=sys.stderr)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
