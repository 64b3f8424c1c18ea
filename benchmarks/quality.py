"""What each method learns of English books, byte by byte, from equal parameters and tokens.

    python benchmarks/quality.py BOOKS --workdir=/tmp/quality

BOOKS is a folder with train.* and test.* files, as `data.files` takes them. Trains one model
after the other, about 6 to 8 CPU minutes each, and prints their bits per byte of the test text as a
table. The same command again goes on where it stopped.

All are the same 4 layers of width 128 on windows of 512 bytes; what a query sees nearby is at
most 64 bytes, an eighth of the window. Where a method's layer has fewer parameters or more, its MLP
is wider or narrower. A config of its own, too:

    python train.py --config=benchmarks/quality.py:routing --config.data.files=BOOKS --workdir=DIR
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax import default_config, registry
from sparseformer_jax.checks import check_choice

sys.path.insert(0, str(Path(__file__).parent))
import children

ROOT = Path(__file__).parents[1]
SPAN = 64

# In the table's order: the method and its options.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "local": ("masformer", {"span": "window", "span_size": SPAN, "num_full_layers": 0}),
    "masformer": ("masformer", {"span": "window", "span_size": SPAN, "num_full_layers": 1}),
    "s2": ("s2", {"block_size": 16, "local_blocks": 4, "vert_stride": 4}),
    "routing": ("routing", {"num_clusters": 8, "window_size": SPAN, "block_size": 32}),
    "routing_paper": (
        "routing",
        {"num_clusters": 8, "window_size": SPAN, "block_size": 32, "selection": "paper"},
    ),
    "combiner_fixed": ("combiner", {"variant": "fixed", "span_size": SPAN}),
    "combiner_axial_row": ("combiner", {"variant": "axial_row", "span_size": SPAN}),
    "combiner_axial_mixture": ("combiner", {"variant": "axial_mixture", "span_size": SPAN}),
    "combiner_log_sparse": ("combiner", {"variant": "log_sparse"}),
}

# Routed heads have one vector for query and key, and an H x H matrix that heads share; a grid's
# rows have projections of their own.
MLP_DIM = {"routing": 540, "routing_paper": 540, "combiner_axial_row": 383}


def get_config(name: str = "dense") -> ConfigDict:
    """Returns the config of a model: a key of `MODELS`."""
    check_choice("config argument", name, tuple(MODELS))
    method, options = MODELS[name]
    config = default_config.get_config()
    config.attention = registry.method_config("attention", method, **options)
    config.model.mlp = "gelu_tanh"
    config.model.mlp_dim = MLP_DIM.get(name, 512)
    config.model.qk_norm = True
    config.model.tie_embeddings = False
    config.data.seq_len = 8 * SPAN
    config.train.num_steps = 1200
    config.train.batch_size = 4
    config.train.log_every = 50
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.015
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.0
    config.eval.split = "test"
    config.eval.plots = False
    config.eval.num_batches = 128
    config.checkpoint.every = 300
    return config


def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", help="folder, file or glob of the text")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        workdir = args.workdir / f"{name}-{args.seed}"
        file = workdir / "row.json"
        if not file.is_file():
            print(f"--- {name}", flush=True)
            row = {"name": name} | train(f"{__file__}:{name}", args.books, workdir, args.seed)
            file.write_text(json.dumps(row))
        rows.append(json.loads(file.read_text()))
    print_table(rows)


def train(config: str, books: str, workdir: Path, seed: int) -> dict[str, Any]:
    """Trains a config in a process of its own; returns its last evaluation and its cost.

    Where that fails, it has said why, and this process ends with its exit code.
    """
    command = [sys.executable, str(ROOT / "train.py"), f"--config={config}", f"--workdir={workdir}"]
    command += [f"--config.data.files={books}", f"--config.seed={seed}"]
    cpu_seconds, _ = children.run(command)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    evaluation = [line for line in lines if "eval/bits_per_byte" in line][-1]
    return {
        "bits_per_byte": evaluation["eval/bits_per_byte"],
        "density": evaluation["eval/density"],
        "cpu_seconds": cpu_seconds,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a Markdown table."""
    print("| model | bits per byte | density | CPU minutes |\n| --- | --- | --- | --- |")
    for row in rows:
        minutes = row["cpu_seconds"] / 60
        print("| {name} | {bits_per_byte:.3f} | {density:.3f}".format(**row), f"| {minutes:.1f} |")


if __name__ == "__main__":
    main()
