"""What 2:4 masks leave of a pretrained model: one-shot pruning, and MaskLLM from each of its masks.

    python -m sparseformer_jax.pretrained import MODEL --workdir=/tmp/model
    python benchmarks/masks.py --model=/tmp/model --books=BOOKS --text=wikitext2/test.txt \
        --workdir=/tmp/masks

All projections of attention and MLP are sparse. BOOKS is a folder with train.* and test.* files:
training's are read to calibrate and to learn masks, no other text is. Perplexity is that of the
first 8 windows of 1024 tokens of the text, which is out of domain, and of the first 2 of each test
book. Rows are made one after the other, and kept: the same command again goes on where it
stopped. The curves of learned masks, validation perplexity over tokens, are drawn to masks.png.

Two cores: a one-shot row takes 2 to 5 CPU minutes, a learned one as `--steps` and `--tokens` say.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import children

ROOT = Path(__file__).parents[1]
# By row: the arguments of `prune`, but for files.
ONE_SHOT = {
    "magnitude": ["--method=magnitude"],
    "Wanda": ["--method=wanda"],
    "Wanda + DSnoT": ["--method=wanda", "--dsnot"],
    "RIA, hidden units dealt anew": ["--method=ria", "--permute"],
    "SparseGPT": ["--method=sparsegpt"],
    "SparseGPT + DSnoT": ["--method=sparsegpt", "--dsnot"],
    "SparseGPT, weights updated": ["--method=sparsegpt", "--update_weights"],
}
PRIORS = ("magnitude", "Wanda", "Wanda + DSnoT", "SparseGPT")
LEARNED = {f"MaskLLM from {prior}": prior for prior in PRIORS}


def main() -> None:
    """Makes what is not there yet and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="workdir of an import")
    parser.add_argument("--books", required=True, help="folder of train.* and test.* files")
    parser.add_argument("--text", required=True, help="file of the text that is out of domain")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of all rows")
    rows = ("dense", *ONE_SHOT, *LEARNED)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW")
    presets = ("smollm2", "gemma3")
    parser.add_argument("--preset", choices=presets, default="smollm2", help="of learned masks")
    help_bos = "window: each begins with the first token, as Gemma wants"
    parser.add_argument("--bos", choices=("none", "window"), default="none", help=help_bos)
    parser.add_argument("--samples", type=int, default=32, help="windows of 1024 to calibrate")
    parser.add_argument("--steps", type=int, default=480, help="of a learned mask")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    args, settings = parser.parse_known_args()
    print("| masks | tokens | text | books | CPU minutes |\n| --- | --- | --- | --- | --- |")
    for name in args.rows:
        row = made(name, args, settings)
        print(
            f"| {name} | {row['tokens']:,} | {row['text']:.2f} | {row['books']:.2f} "
            f"| {row['cpu_seconds'] / 60:.1f} |",
            flush=True,
        )
    draw(args.workdir, [name for name in args.rows if name in LEARNED])


def folder(name: str, workdir: Path) -> Path:
    """Returns where a row is kept."""
    return workdir / name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")


def made(name: str, args: argparse.Namespace, settings: list[str]) -> dict[str, Any]:
    """Returns a row, made if it is not there yet."""
    workdir = args.model if name == "dense" else folder(name, args.workdir)
    file = args.workdir / f"{folder(name, Path()).name}.json"
    if not file.is_file():
        print(f"--- {name}", file=sys.stderr, flush=True)
        cost, tokens = 0.0, 0
        if name in ONE_SHOT:
            cost = pruned(name, workdir, args)
            tokens = 0 if name == "magnitude" else 1024 * args.samples
        elif name in LEARNED:
            made(LEARNED[name], args, settings)
            cost, tokens = learned(name, workdir, args, settings), args.steps * args.tokens
        bos = f"--bos={args.bos}"
        on_text = perplexity(workdir, bos, "--num_windows=8", f"--files={args.text}")
        split = f"--config.data.files={args.books}"
        on_books = perplexity(workdir, bos, "--num_windows=2", "--split=test", split)
        row = {"tokens": tokens, "text": on_text, "books": on_books, "cpu_seconds": cost}
        args.workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def pruned(name: str, workdir: Path, args: argparse.Namespace) -> float:
    """Prunes the model; returns the CPU seconds it took, or the rest of it took."""
    # A folder is there once it is whole.
    if workdir.is_dir():
        return 0.0
    command = [sys.executable, "-m", "sparseformer_jax.sparsity", "prune", *ONE_SHOT[name]]
    command += [f"--workdir={args.model}", "--pattern=2:4", f"--out={workdir}"]
    if name != "magnitude":
        command += [f"--num_samples={args.samples}", "--seq_len=1024"]
        command += [f"--config.data.files={args.books}"]
    return children.run(command)[0]


def learned(name: str, workdir: Path, args: argparse.Namespace, settings: list[str]) -> float:
    """Learns masks; returns the CPU seconds it took, or the rest of it took."""
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}"]
    command += [
        f"--config={ROOT / 'configs/maskllm.py'}:{args.preset}",
        f"--config.data.files={args.books}",
    ]
    command += [f"--config.init_from={args.model}"]
    command += [f"--config.sparsity.prior={folder(LEARNED[name], args.workdir)}"]
    command += [f"--config.train.num_steps={args.steps}"]
    command += [f"--config.sparsity.schedule_steps={args.steps}"]
    command += [f"--config.data.seq_len={args.tokens}", "--config.eval.num_batches=8"]
    every = max(1, args.steps // 16)
    command += [f"--config.eval.every={every}", f"--config.checkpoint.every={2 * every}"]
    command += ["--config.eval.plots=False"]
    return children.run([*command, *settings])[0]


def perplexity(workdir: Path, *arguments: str) -> float:
    """Returns the perplexity of windows of 1024 tokens."""
    command = [sys.executable, "-m", "sparseformer_jax.evaluation.windows"]
    command += [f"--workdir={workdir}", "--config.eval.batch_size=2", *arguments]
    return json.loads(children.run(command, stdout=subprocess.PIPE)[1])["perplexity"]


def draw(workdir: Path, names: list[str]) -> None:
    """Draws the validation loss of learned masks over tokens."""
    if not names:
        return
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        lines = (folder(name, workdir) / "metrics.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if "eval/loss" in line]
        config = json.loads((folder(name, workdir) / "config.json").read_text())
        tokens = config["data"]["seq_len"] * config["train"]["batch_size"]
        axes.plot(
            [tokens * line["step"] for line in found],
            [line["eval/perplexity"] for line in found],
            marker="o",
            label=name,
        )
    axes.set(xlabel="tokens", ylabel="perplexity of validation books", yscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(ticker.LogFormatter())
    axes.yaxis.set_minor_formatter(ticker.LogFormatter())
    axes.legend()
    figure.savefig(workdir / "masks.png", dpi=150)


if __name__ == "__main__":
    main()
