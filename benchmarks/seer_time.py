"""What SeerAttention costs: a step of distillation, and attention to chosen blocks by length.

    python benchmarks/seer_time.py

One layer of SmolLM2-135M's heads, prefill: dense attention, the gate with its choice of blocks, and
attention to those, each compiled and run in turn; a time is the median over rounds. The gate's
share is that of gate and sparse attention together. "from" is the shortest length measured where
those two are faster than dense attention. Then a training step of gates of all layers beside a
forward pass of the dense model, with the temporary memory the compiler plans.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from sparseformer_jax import default_config, mesh, registry
from sparseformer_jax.attention import seer
from sparseformer_jax.attention._block_selection import choose
from sparseformer_jax.attention._gate_scores import scored_by
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.evaluation.perplexity import make_eval_step
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.training.state import ModelDef, TrainState

sys.path.insert(0, str(Path(__file__).parent))
import trainer


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.2, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq_len", type=int, default=2048, help="of the training step")
    args = parser.parse_args()
    print("| tokens | density | dense ms | gate ms | sparse ms | gate's share | of dense |")
    print("| --- " * 7 + "|", flush=True)
    first: dict[float, int] = {}
    for length in args.lengths:
        for density in args.densities:
            dense, gate, sparse = attention_times(length, density, args.rounds)
            ratio = (gate + sparse) / dense
            if ratio < 1:
                first.setdefault(density, length)
            print(
                f"| {length} | {density:g} | {dense:.1f} | {gate:.1f} | {sparse:.1f} "
                f"| {gate / (gate + sparse):.0%} | {ratio:.2f} |",
                flush=True,
            )
    for density in args.densities:
        print(f"density {density:g}: faster from {first.get(density, 'none')} tokens")
    print_training(args.seq_len, args.rounds)


def attention_times(length: int, density: float, rounds: int) -> list[float]:
    """Returns ms of dense attention, of the gate's choice, and of attention to its blocks."""
    config = ModelConfig(**get_config(length).model)
    options = seer.Options(density=density)
    module = nnx.eval_shape(lambda: seer.Method(config, options, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    state = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 20, state)
    shape = (1, length, config.num_heads, config.head_dim)
    kv_shape = (1, length, config.num_kv_heads, config.head_dim)
    query, key, value = (jax.random.normal(next(keys), s) for s in (shape, kv_shape, kv_shape))
    positions = jnp.arange(length)[None]
    inputs = Inputs(
        query,
        key,
        value,
        positions=(positions, positions),
        unrotated_query=query,
        unrotated_key=key,
    )
    shard = Shard(num_heads=config.num_heads)

    def method(state: Any) -> seer.Method:
        return nnx.merge(graph, state)

    def dense(state: Any, inputs: Inputs) -> jax.Array:
        return method(state)._dense(inputs, shard)[0]

    def gate(state: Any, inputs: Inputs) -> jax.Array:
        return choose(options, scored_by(method(state).gate, inputs, shard))[0]

    def sparse(state: Any, inputs: Inputs, chosen: jax.Array) -> jax.Array:
        capacity = options.most_blocks(chosen.shape[-1])
        return method(state)._attend_map(inputs, chosen, 0, capacity)

    chosen = jax.jit(gate)(state, inputs)
    runs: list[tuple[Callable[..., Any], tuple[Any, ...]]]
    runs = [(dense, (state, inputs)), (gate, (state, inputs)), (sparse, (state, inputs, chosen))]
    return medians([(compiled(f, *own), own) for f, own in runs], rounds)


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Returns the program of a function for such arguments."""
    return jax.jit(function).lower(*arguments).compile()


def medians(runs: list[tuple[Callable[..., Any], tuple[Any, ...]]], rounds: int) -> list[float]:
    """Returns the median ms of each program, run in turn."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for (program, arguments), times in zip(runs, found, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(1e3 * (time.perf_counter() - start))
    # The first round reads pages that nothing has touched.
    return [statistics.median(times[1:]) for times in found]


def get_config(seq_len: int) -> ConfigDict:
    """Returns the config of gates for a model of SmolLM2-135M's sizes."""
    config = default_config.get_config()
    model = config.model
    model.vocab_size, model.num_layers, model.embed_dim = 49_152, 30, 576
    model.num_heads, model.num_kv_heads, model.head_dim, model.mlp_dim = 9, 3, 64, 1536
    config.attention = registry.method_config("attention", "seer")
    config.train.trainable = r".*/attention/gate/.*"
    config.data.seq_len, config.train.batch_size = seq_len, 1
    return config


def print_training(seq_len: int, rounds: int) -> None:
    """Prints what a step of distillation costs beside a forward pass."""
    config, dense = get_config(seq_len), get_config(seq_len)
    dense.attention = registry.method_config("attention", "dense")
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        step, state, batch = trainer.compiled_step(config)
        model_def = ModelDef(dense)
        # The step takes its state's memory; the forward pass has its own.
        params = {name: jnp.copy(state.params[name]) for name in model_def.params}
        own = TrainState(jnp.copy(state.step), params, {})
        one = {name: x[0] for name, x in batch.items()}
        forward = compiled(make_eval_step(model_def), own, one)

        def train(batch: Any) -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        times = medians([(forward, (own, one)), (train, (batch,))], rounds)
    print(f"\n| {seq_len} tokens | s | temporary MB |\n| --- | --- | --- |")
    for name, program, ms in zip(("forward", "distil"), (forward, step), times, strict=True):
        memory = program.memory_analysis().temp_size_in_bytes / 1e6
        print(f"| {name} | {ms / 1e3:.2f} | {memory:.0f} |")
    print(f"a step takes {times[1] / times[0]:.2f} of a forward pass")


if __name__ == "__main__":
    main()
