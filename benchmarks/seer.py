"""What SeerAttention's gates keep of a pretrained model, beside other ways to choose blocks.

    python -m sparseformer_jax.pretrained import MODEL --workdir=/tmp/model
    python benchmarks/seer.py --model=/tmp/model --books=BOOKS --text=wikitext2/test.txt \
        --workdir=/tmp/seer

Distils gates of blocks of queries and gates of single queries, and evaluates the model where they
choose, at some densities or token budgets, beside its own dense attention, the blocks that gates
learn from ("oracle"), products of average queries and keys, gates as they start, and the latest
blocks with the first. BOOKS is a folder with train.* and test.* files: gates learn from training's,
no other text is read. The text is out of domain.

A figure of text is perplexity of the first windows of 1024 and 2048 tokens; "pass key" is how many
prompts of 1024 tokens of that task are answered, an answer being what the model finds likeliest at
every token. Last come what of the difference in log-perplexity between gates as they start and the
oracle the gates close, and PNGs. Rows are kept: the same command again goes on where it stopped.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parent))
import children

from sparseformer_jax import command, figures
from sparseformer_jax.evaluation import texts
from sparseformer_jax.evaluation.retrieval.tasks import make_questions
from sparseformer_jax.evaluation.scoring import Scorer, Window
from sparseformer_jax.evaluation.windows import Windows
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.sampling import Sampler

ROOT = Path(__file__).parents[1]
# By what a gate scores for: its options, what chooses, and how much of it.
GATES: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "blocks": ({"gates": "prefill"}, "density", (0.5, 0.3, 0.2, 0.1)),
    "queries": (
        {"gates": "decode", "query_projection": "group", "gate_norm": True},
        "token_budget",
        (512, 256, 128),
    ),
}
# By row: whose gates, and the options that evaluate them.
SELECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "oracle": ("random", {"selector": "oracle"}),
    "gate": ("learned", {}),
    "mean pooled": ("random", {"selector": "mean_pooled"}),
    "random gate": ("random", {}),
    "latest and first": ("random", {"selector": "recent", "keeps_first": True}),
}
# By length: windows of the text, and of each of the test books.
WINDOWS = {1024: (8, 1), 2048: (4, 1)}
PASS_KEYS = 10


def main() -> None:
    """Makes what is not there yet and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="workdir of an import")
    parser.add_argument("--books", required=True, help="folder of train.* and test.* files")
    parser.add_argument("--text", required=True, help="file of the text that is out of domain")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of all rows")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--steps", type=int, default=200, help="of 2048 tokens, to distil")
    args, settings = parser.parse_known_args()
    bench = Bench(args, settings)
    for kind in args.gates:
        minutes = bench.distil(kind)
        print(f"\nGates of {kind}: {2048 * args.steps:,} tokens, {minutes:.1f} CPU minutes.\n")
        print_table(kind, list(bench.rows(kind)), args.workdir)


def print_table(kind: str, rows: Sequence[tuple[str, float, dict[str, Any]]], folder: Path) -> None:
    """Prints the rows, what gates close of the difference between two of them, and draws them."""
    columns = list(rows[0][2])
    print(f"| {GATES[kind][1]} | blocks by | {' | '.join(columns)} |")
    print("| --- " * (2 + len(columns)) + "|")
    for name, amount, row in rows:
        cells = [
            f"{row[c]:.0f} of {PASS_KEYS}" if c == "pass key" else f"{row[c]:.2f}" for c in row
        ]
        shown = "all" if name == "dense" else f"{amount:g}"
        print(f"| {shown} | {name} | {' | '.join(cells)} |", flush=True)
    by_row = {(name, amount): row for name, amount, row in rows}
    columns = [c for c in columns if c != "pass key"]
    print(f"\n| closed by the gate | {' | '.join(columns)} |")
    print("| --- " * (1 + len(columns)) + "|")
    for amount in GATES[kind][2]:
        worst, own, best = (by_row[name, amount] for name in ("random gate", "gate", "oracle"))
        closed = [math.log(worst[c] / own[c]) / math.log(worst[c] / best[c]) for c in columns]
        print(f"| {amount:g} | {' | '.join(f'{x:.1%}' for x in closed)} |")
    draw(kind, by_row, columns, folder / f"seer_{kind}.png")


def draw(
    kind: str,
    rows: dict[tuple[str, float], dict[str, Any]],
    columns: Sequence[str],
    file: Path,
) -> None:
    """Draws perplexity over how much is attended to, a panel a text."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    figure, panels = figures.new(1, len(columns), height=3.2, sharey=True)
    for panel, column in zip(panels.flat, columns, strict=True):
        for name in SELECTORS:
            amounts = GATES[kind][2]
            panel.plot(amounts, [rows[name, x][column] for x in amounts], marker="o", label=name)
        dense = next(row[column] for (name, _), row in rows.items() if name == "dense")
        panel.axhline(dense, color="grey", linestyle=":", label="dense")
        panel.set(xscale="log", yscale="log", title=column, xlabel=GATES[kind][1])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.set_xticks(amounts, [f"{x:g}" for x in amounts])
    panels.flat[0].set_ylabel("perplexity")
    handles = panels.flat[0].get_lines()
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figures.save(figure, file)


class Bench:
    """The runs of a workdir.

    Args:
      args: of the command.
      settings: more arguments for training.
    """

    def __init__(self, args: argparse.Namespace, settings: Sequence[str]) -> None:
        self.args, self.settings = args, settings
        self._windows: dict[str, list[Window]] = {}

    def distil(self, kind: str) -> float:
        """Trains gates, and makes a run of gates as they start; returns CPU minutes."""
        file = self.args.workdir / f"{kind}.json"
        if not file.is_file():
            # A step that changes next to nothing leaves gates as they start.
            least = ["--config.optimizer.learning_rate=1e-12", "--config.optimizer.warmup_steps=0"]
            self._train(kind, "random", 1, least)
            seconds = self._train(kind, "learned", self.args.steps, self.settings)
            file.write_text(json.dumps(seconds))
        return json.loads(file.read_text()) / 60

    def _train(self, kind: str, whose: str, steps: int, settings: Sequence[str]) -> float:
        options = GATES[kind][0] | {GATES[kind][1]: GATES[kind][2][1]}
        command = [sys.executable, str(ROOT / "train.py"), f"--workdir={self._run(kind, whose)}"]
        command += [f"--config={ROOT / 'configs/seer.py'}:smollm2"]
        command += [f"--config.init_from={self.args.model}", "--config.eval.plots=False"]
        command += [f"--config.data.files={self.args.books}", f"--config.train.num_steps={steps}"]
        command += ["--config.attention.density=None"]
        command += [f"--config.attention.{name}={value}" for name, value in options.items()]
        command += ["--config.eval.num_batches=1", "--config.train.log_every=10"]
        return children.run([*command, *settings])[0]

    def _run(self, kind: str, whose: str) -> Path:
        return self.args.workdir / f"{kind}-{whose}"

    def rows(self, kind: str) -> Iterator[tuple[str, float, dict[str, Any]]]:
        """Yields name, amount and figures of the rows of a kind of gates."""
        _, choice, amounts = GATES[kind]
        yield "dense", 1.0, self._row(f"{kind}-dense", self._run(kind, "random"), {choice: None})
        for amount in amounts:
            for name, (whose, options) in SELECTORS.items():
                file = f"{kind}-{amount:g}-{name.replace(' ', '_')}"
                found = self._row(file, self._run(kind, whose), {choice: amount, **options})
                yield name, amount, found

    def _row(self, name: str, run: Path, options: dict[str, Any]) -> dict[str, Any]:
        file = self.args.workdir / f"{name}.json"
        if not file.is_file():
            print(f"--- {name}", file=sys.stderr, flush=True)
            config = command.saved(str(run))
            config.eval.batch_size = 1
            config.attention.update(options)
            command.validate(config)
            file.write_text(json.dumps(self._figures(config, run)))
        return json.loads(file.read_text())

    def _figures(self, config: ConfigDict, run: Path) -> dict[str, Any]:
        """Perplexity of each text and length, and how many pass keys are found."""
        if not self._windows:
            self._windows = make_windows(config, run, self.args)
        scorer, found = Scorer(config, run), dict[str, Any]()
        for name, windows in self._windows.items():
            scores = scorer(windows, lambda n: 1024 if n < 1024 else 2048)
            if name == "pass key":
                found[name] = int(scores.is_greedy.sum())
            else:
                tokens = sum(len(window.tokens) - window.seen for window in windows)
                found[name] = math.exp(scores.nll.sum() / tokens)
        return found


def make_windows(
    config: ConfigDict, run: Path, args: argparse.Namespace
) -> dict[str, list[Window]]:
    """Returns the windows of each column."""
    sampler = Sampler(config, run, choice=Choice(temperature=0.0))
    data = ConfigDict(config.data.to_dict() | {"files": (args.books,)})
    documents = {
        "text": texts.of_files(data, [Path(args.text)])[args.text],
        "books": texts.of_split(data, "test")["test"],
    }
    encoded = {name: sampler.tokenizer.encode_batch(own) for name, own in documents.items()}
    found = {}
    for size, numbers in WINDOWS.items():
        for (name, own), number in zip(encoded.items(), numbers, strict=True):
            cut = Windows(size, number)
            found[f"{name} {size}"] = [x for ids in own for x in cut.cut(ids, None)]
    asked = make_questions(
        "passkey", 1024, depths=[0.1, 0.3, 0.5, 0.7, 0.9], num_examples=2, seed=0, sampler=sampler
    )
    found["pass key"] = [answered(x.prompt, x.answers[0], sampler) for x in asked.items]
    return found


def answered(prompt: str, answer: str, sampler: Sampler) -> Window:
    """Returns a prompt and its answer, which is to be predicted."""
    before = sampler.encode(prompt)
    return Window(np.array([*before, *sampler.tokenizer.encode(" " + answer)]), len(before))


if __name__ == "__main__":
    main()
