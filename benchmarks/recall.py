"""Associative recall: what routing and Combiner find that their local heads alone cannot.

    python benchmarks/recall.py                                  # the table
    python benchmarks/recall.py --output=recall.json --picture=docs/recall.png
    python benchmarks/recall.py --pair --methods dense "combiner, fixed"
    python benchmarks/recall.py --options '{"window_size": 64}' --methods routing

Trains two layers on the task of `recall_task.py`, through the trainer's own step, and counts the
answers they get right on rows they never saw. Everything but attention is equal. Nothing but
attention carries an answer to its question, from 17 to 127 tokens on, and a local block holds 4.

- `routing`: all four heads see the last 32 members of one of 4 clusters each.
- `routing, random centroids`: the same, `centroid_update="frozen"`: clusters are those of
  centroids drawn at random, and only the vectors learn to fall into them.
- `routing, local alone`: all four see their block, `num_routed_heads=0`.
- `combiner, ...`: blocks, rows or columns of 4; "log_sparse" reads no size.
- `combiner, blocks alone`: MASFormer without full layers, whose blocks of 4 are those that
  Combiner attends to directly: Combiner without its summaries.
- `dense`: what there is to reach.

Whoever knows nothing answers 1 of 8 questions, and whoever knows the values of the row but not
which key has which about 1 of 4. A run takes 20 to 60 CPU seconds, and there are 18.
"""

import argparse
import ast
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict
from recall_task import Recall
from tqdm import tqdm

from pallas_kernels.bench.timing import device, table
from sparseformer_jax import data, default_config, mesh, registry
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, TrainState, init_state
from sparseformer_jax.training.step import make_train_step

BLOCK = 4  # tokens; a cell of the task
ROUTING = {
    "name": "routing",
    "num_routed_heads": 4,
    "num_clusters": 4,
    "window_size": 32,
    "block_size": BLOCK,
    "local_blocks": 1,
    "decay": 0.99,
}
METHODS: dict[str, dict[str, Any]] = {
    "routing": ROUTING,
    "routing, random centroids": ROUTING | {"centroid_update": "frozen"},
    "routing, local alone": ROUTING | {"num_routed_heads": 0},
    "combiner, fixed": {"name": "combiner", "span_size": BLOCK},
    "combiner, axial_row": {"name": "combiner", "span_size": BLOCK, "variant": "axial_row"},
    "combiner, axial_mixture": {"name": "combiner", "span_size": BLOCK, "variant": "axial_mixture"},
    "combiner, log_sparse": {"name": "combiner", "variant": "log_sparse"},
    "combiner, blocks alone": {"name": "masformer", "span_size": BLOCK, "num_full_layers": 0},
    "dense": {"name": "dense"},
}
OPTIONAL = ("combiner, axial_row", "combiner, axial_mixture", "combiner, log_sparse")
DEFAULT = [name for name in METHODS if name not in OPTIONAL]
TRAIN, TEST = 0, 1  # rows of which follow from other seeds
TEST_ROWS = 64
NUM_BINS = 7  # of distances

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all, prints the table, writes the JSON and the picture."""
    args = parse(arguments)
    task = Recall(pair=args.pair)
    rows = []
    for name in tqdm(args.methods, "methods", disable=None):
        for seed in args.seeds:
            options = METHODS[name] | args.options
            config = make_config(task, options, seed, args.steps, args.rate)
            rows.append({"method": name, "seed": seed} | learn(config, task, args.every))
            tqdm.write(f"{name}, seed {seed}: {rows[-1]['accuracy'][-1]:.3f}")
            if args.output:  # at once: a run takes a minute, and all of them half an hour
                report = {"device": device(), "task": vars(task), "steps": args.steps, "rows": rows}
                args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(device(), accuracy_table(rows), sep="\n\n")
    if args.picture:
        draw(rows, args.picture)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of 16 rows (default: 400)")
    parser.add_argument("--every", type=int, default=25, help="steps between two evaluations")
    parser.add_argument("--rate", type=float, default=4e-3, help="of AdamW, at its peak")
    parser.add_argument("--pair", action="store_true", help="a definition is two tokens")
    parser.add_argument(
        "--options", type=ast.literal_eval, default={}, help="of attention, instead: a dictionary"
    )
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of all that was measured")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG of accuracy")
    return parser.parse_args(arguments)


def make_config(
    task: Recall, attention: dict[str, Any], seed: int, steps: int, rate: float
) -> ConfigDict:
    """Returns a config of two layers, 64 wide, for a task and the options of attention."""
    config = default_config.get_config()
    config.seed = seed
    options = {key: value for key, value in attention.items() if key != "name"}
    config.attention = registry.method_config("attention", attention["name"], **options)
    config.model.vocab_size = task.vocab_size
    config.model.num_layers = 2
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.mlp = "gelu_tanh"
    config.model.tie_embeddings = False
    config.data.seq_len = task.seq_len
    config.train.batch_size = 16
    config.train.num_steps = steps
    config.optimizer.learning_rate = rate
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = min(50, steps // 10)
    config.optimizer.decay_steps = steps // 3
    config.optimizer.final_fraction = 0.0
    return config


def learn(config: ConfigDict, task: Recall, every: int) -> Row:
    """Trains a config and returns its accuracy by step and, at the end, by distance.

    The row holds "steps" and "accuracy", which are as long, "distances", the centres of bins of
    equal width, and "accuracy_by_distance"; "loss" is that of the last step, in nats an answer.
    Diagnostics are the last step's.
    """
    model_def, steps = ModelDef(config), config.train.num_steps
    optimizer = make_optimizer(config.optimizer, steps, model_def.params)
    schedule = make_schedule(config.optimizer, steps)
    batch, distances = task.with_distances(TEST_ROWS, TEST)
    row: Row = {"steps": [], "accuracy": []}
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        step = jax.jit(make_train_step(model_def, optimizer, schedule), donate_argnums=0)
        state = jax.jit(lambda: init_state(model_def, optimizer, jax.random.key(config.seed)))()
        are_right, test = jax.jit(answers(model_def)), _on_device(batch, "batch", "seq")
        for number, piece in enumerate(_train_batches(config, task), start=1):
            state, metrics = step(state, piece)
            if number % every == 0 or number == steps:
                right = np.asarray(are_right(state, test))
                row["steps"].append(number)
                row["accuracy"].append(float(right[distances > 0].mean()))
    row["distances"], row["accuracy_by_distance"] = by_distance(right, distances)
    numbers = {name: x for name, x in metrics.items() if name not in ("layers", "nonfinite")}
    return row | {name: float(x) for name, x in numbers.items()}


def answers(model_def: ModelDef) -> Callable[[TrainState, data.Batch], jax.Array]:
    """Returns the function (state, batch) -> [B, T], whether the likeliest token is the target."""

    def are_right(state: TrainState, batch: data.Batch) -> jax.Array:
        model = model_def.model(state.params, state.variables, state.step)
        output = model(batch["inputs"], batch["positions"], batch["segment_ids"])
        return jnp.argmax(output.logits, axis=-1) == batch["targets"]

    return are_right


def by_distance(
    right: Bool[np.ndarray, "B T"], distances: np.ndarray
) -> tuple[list[float], list[float]]:
    """Returns the centres of those of `NUM_BINS` bins that hold any, and the accuracy in each."""
    own, hits = distances[distances > 0], right[distances > 0].astype(float)
    edges = np.linspace(own.min(), own.max() + 1, NUM_BINS + 1)
    totals, _ = np.histogram(own, edges)
    found, _ = np.histogram(own, edges, weights=hits)
    centres, some = (edges[1:] + edges[:-1]) / 2, totals > 0
    return centres[some].tolist(), (found[some] / totals[some]).tolist()


def accuracy_table(rows: list[Row]) -> str:
    """Returns final accuracies as Markdown, and after how many steps each seed passed 0.95."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        final = [row["accuracy"][-1] for row in own]
        first = [_first(row) for row in own]
        lines.append(
            [
                name,
                f"{np.mean(final):.3f}",
                f"{min(final):.3f} to {max(final):.3f}",
                ", ".join("never" if step is None else str(step) for step in first),
                f"{np.mean([row['density'] for row in own]):.2f}",
                _largest(own),
            ]
        )
    header = ["method", "accuracy", "of seeds", "0.95 after steps", "density", "largest cluster"]
    return table(header, lines)


def draw(rows: list[Row], path: pathlib.Path) -> None:
    """Writes a picture: accuracy over training, and at its end by distance."""
    from matplotlib import pyplot

    figure, (course, end) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained", sharey=True
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        style = "--" if "alone" in name else ":" if name == "dense" else "-"
        accuracy = np.array([row["accuracy"] for row in own])
        (line,) = course.plot(own[0]["steps"], accuracy.mean(0), style, label=name)
        colour = line.get_color()
        course.fill_between(
            own[0]["steps"], accuracy.min(0), accuracy.max(0), color=colour, alpha=0.15, linewidth=0
        )
        final = np.mean([row["accuracy_by_distance"] for row in own], axis=0)
        end.plot(own[0]["distances"], final, style, color=colour, marker="o", markersize=3)
    course.set(xlabel="training step", ylabel="accuracy on new rows", ylim=(0, 1.02))
    course.set_title("mean of seeds; shade: lowest to highest", fontsize=10)
    end.set(xlabel="tokens from a definition to its question")
    end.set_title("at the end", fontsize=10)
    for panel in (course, end):
        panel.axhline(1 / Recall().num_values, color="0.5", linewidth=0.8, label="a guess")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.legend(
        *course.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _train_batches(config: ConfigDict, task: Recall) -> Iterator[dict[str, jax.Array]]:
    """The batches of all steps, in one piece each, on the device."""
    for number in range(config.train.num_steps):
        batch = task.batch(config.train.batch_size, TRAIN, config.seed, number)
        piece = {name: array[None] for name, array in batch.items()}
        yield _on_device(piece, None, "batch", "seq")


def _on_device(batch: data.Batch, *axes: str | None) -> dict[str, jax.Array]:
    return {name: jax.device_put(array, mesh.spec(*axes)) for name, array in batch.items()}


def _first(row: Row) -> int | None:
    """The first evaluation at 0.95 or more."""
    passed = (s for s, x in zip(row["steps"], row["accuracy"], strict=True) if x >= 0.95)
    return next(passed, None)


def _largest(rows: list[Row]) -> str:
    """The share of tokens in the largest cluster, on average, where there are clusters."""
    if "largest_cluster" not in rows[0]:
        return ""
    return f"{np.mean([row['largest_cluster'] for row in rows]):.2f}"


if __name__ == "__main__":
    main()
