"""What n:m recipes learn of English books from scratch, at the FLOPs of a dense run.

    python benchmarks/sparse_training.py BOOKS --workdir=/tmp/sparse_training

BOOKS is a folder with train.* and test.* files, as `data.files` takes them. Trains dense weights,
SR-STE and the four recipes of Progressive Gradient Flow, MLPs at 2:4 and at 1:8, and prints the
bits per byte of the test text, of hard masks, as mean and range over seeds. The same command again
goes on where it stopped.

Model and data are those of benchmarks/quality.py with dense attention. A step counts the FLOPs that
its weights leave, as `train.py --describe` does, so a sparse run has more steps: as many as cost
what the dense run's do. A tenth of them is dense, a fifth has hard masks. `--pruned_grad` takes
another backward pass.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax import describe, registry
from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.training.state import ModelDef

sys.path.insert(0, str(Path(__file__).parent))
import quality

RECIPES = ("sr_ste", "mdgf_linear", "mdgf_exponential", "sdgf_stepwise", "sdgf_geometric")
PATTERNS = ("2:4", "1:8")
DENSE_STEPS = 500


def get_config(name: str = "dense") -> ConfigDict:
    """Returns a run: "dense", or "RECIPE,N:M,PRUNED_GRAD"."""
    config = quality.get_config("dense")
    config.train.num_steps = DENSE_STEPS
    if name == "dense":
        return config
    if name.count(",") != 2:
        raise ConfigError(f"config argument={name!r}: must be dense or RECIPE,N:M,PRUNED_GRAD")
    recipe, pattern, pruned_grad = name.split(",")
    check_choice("config argument", recipe, RECIPES)
    budget = flops(config)
    fraction = 1.0
    # What is left out depends on the phases, which depend on the number of steps.
    for _ in range(5):
        config.train.num_steps = round(DENSE_STEPS / fraction)
        config.sparsity = sparsity(config.train.num_steps, recipe, pattern, pruned_grad)
        fraction = flops(config) / (budget * config.train.num_steps / DENSE_STEPS)
    return config


def sparsity(num_steps: int, recipe: str, pattern: str, pruned_grad: str) -> ConfigDict:
    """Returns the section of a recipe, in phases of a run of so many steps."""
    return registry.method_config(
        "sparsity",
        "pgf",
        recipe=recipe,
        targets=(f"ff={pattern}",),
        pruned_grad=pruned_grad,
        dense_steps=num_steps // 10,
        decay_steps=num_steps * 7 // 10,
    )


def flops(config: ConfigDict) -> float:
    """Returns the FLOPs of a run."""
    return describe.training_flops(config, ModelDef(config))


def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("books", help="folder, file or glob of the text")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--pruned_grad", default="scaled", choices=("scaled", "straight_through"))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    names = ["dense"]
    for pattern in args.patterns:
        for recipe in args.recipes:
            pruned_grad = "scaled" if recipe == "sr_ste" else args.pruned_grad
            names.append(f"{recipe},{pattern},{pruned_grad}")
    print("| run | steps | bits per byte | range | CPU minutes |\n| --- | --- | --- | --- | --- |")
    for name in names:
        rows = [row(name, args.books, args.workdir, seed) for seed in range(args.seeds)]
        found = [row["bits_per_byte"] for row in rows]
        minutes = sum(row["cpu_seconds"] for row in rows) / 60 / len(rows)
        print(
            f"| {name.replace(',', ' ')} | {rows[0]['steps']} | {sum(found) / len(found):.3f} "
            f"| {min(found):.3f} to {max(found):.3f} | {minutes:.1f} |",
            flush=True,
        )


def row(name: str, books: str, workdir: Path, seed: int) -> dict[str, Any]:
    """Returns what a run came to, trained if it is not yet."""
    folder = workdir / f"{name.replace(',', '-').replace(':', 'of')}-{seed}"
    file = folder / "row.json"
    if not file.is_file():
        print(f"--- {name}, seed {seed}", file=sys.stderr, flush=True)
        steps = get_config(name).train.num_steps
        found = {"steps": steps} | quality.train(f"{__file__}:{name}", books, folder, seed)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


if __name__ == "__main__":
    main()
