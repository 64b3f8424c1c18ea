"""One-shot pruning of a model, layer by layer, on a little text.

As released by the methods' authors: all projections of a layer are observed at once, while it is
dense, on what the pruned layers before it make of the text; then all are pruned, and the next layer
sees what the pruned one makes. A device holds one layer, the sums over its inputs and a batch of
the text; the residual stream of all of it lies in the host's memory.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax import data
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.data.packing import Batch, PackedExamples
from sparseformer_jax.model.layers import Projection
from sparseformer_jax.model.transformer import Block
from sparseformer_jax.sparsity import _ria, one_shot
from sparseformer_jax.sparsity._statistics import Statistics
from sparseformer_jax.sparsity.base import hard
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.one_shot import Recipe
from sparseformer_jax.sparsity.targets import KERNEL
from sparseformer_jax.training.state import ModelDef

_SEEN = ("inputs", "positions", "segment_ids")

_EMBEDDINGS = ("embedding/", "position_embedding/")
_DOWN = "mlp/down"

# Which axis of what in a layer are the hidden units of its MLP.
_HIDDEN = {"mlp/down/kernel": 0}
_HIDDEN |= {f"mlp/{name}/{own}": -1 for name in ("gate", "up") for own in ("kernel", "bias")}

# Paths of the projections of a layer that share an input, and its sums.
_Sums = dict[tuple[str, ...], Statistics]


def draw(config: ConfigDict, split: str, num_samples: int, seed: int) -> Batch:
    """Returns so many examples of `data.seq_len` tokens of a split, each at most once.

    Args:
      config: of a run.
      split: of its data.
      num_samples: how many.
      seed: of the draw, below 2**32.

    Raises:
      ConfigError: there are fewer, or the text cannot be read.
    """
    corpus = data.load_corpus(config.data, split, make_tokenizer(config))
    seq_len = config.data.seq_len
    examples = PackedExamples(corpus, seq_len, seed=seed)
    if len(examples) < num_samples:
        raise ConfigError(
            f"--num_samples={num_samples}: with --seq_len={seq_len} they take"
            f" {num_samples * seq_len + 1} tokens, split {split!r} has {corpus.num_tokens}; lower"
            " one of them or add text"
        )
    # Unlike numpy.random.Generator, RandomState never changes its stream.
    chosen = np.random.RandomState(seed).permutation(len(examples))[:num_samples]
    rows = [examples[int(index)] for index in chosen]
    return {name: np.stack([row[name] for row in rows]) for name in _SEEN}


def prune_model(
    model_def: ModelDef,
    values: Mapping[str, jax.Array],
    targets: Sequence[str],
    recipe: Recipe,
    samples: Batch | None,
    *,
    step: int,
    batch_size: int,
) -> Iterator[tuple[str, jax.Array, jax.Array | None]]:
    """Yields the name of each target, its weight and its mask, in the shape of the kernel.

    Where hidden units of an MLP are permuted, others that this changes come with None.

    Args:
      model_def: of the model, whose weights are dense.
      values: parameters and variables by the names of layers, in the host's memory.
      targets: names of kernels.
      recipe: what is done to each.
      samples: as of `draw`; None where the recipe reads no inputs.
      step: of training.
      batch_size: samples computed at a time.

    Raises:
      ConfigError: a target is of no projection.
      NonFiniteError: scores are not finite numbers.
    """
    blocks = list(_blocks(model_def))
    chosen = [_paths(f"layers/{n}/", block, targets) for n, block in enumerate(blocks)]
    stream = None
    if samples is not None:
        stream = _Stream(_embedded(model_def, values, samples, batch_size), samples, step)
    bar = tqdm(blocks, desc="prune", unit="layer", leave=False, disable=None)
    for number, block in enumerate(bar):
        start = f"layers/{number}/"
        own = {
            n.removeprefix(start): on_device(x) for n, x in values.items() if n.startswith(start)
        }
        sums: _Sums = {}
        if stream is not None:
            sums = stream.observe(block, own, chosen[number], products=recipe.reads_products)
        by_path = {path: x for paths, x in sums.items() for path in paths}
        if recipe.permute and _DOWN in by_path:
            own, by_path = _permuted(recipe, own, by_path)
            for name in own.keys() & _HIDDEN.keys() - {f"{p}/{KERNEL}" for p in chosen[number]}:
                yield start + name, own[name], None
        for path in chosen[number]:
            name = f"{path}/{KERNEL}"
            in_dims = _projection(block, path).in_dims
            weight, mask, is_finite = _prune(recipe, in_dims, own[name], by_path.get(path))
            if not is_finite:
                raise NonFiniteError(
                    f"{start}{name}: its scores are not finite: its weights or its inputs are not,"
                    f" or {recipe.method} needs more text than --num_samples"
                )
            yield start + name, weight, mask
            own[name] = hard(weight, mask)
        if stream is not None and number + 1 < len(blocks):
            stream.advance(block, own)


class _Stream:
    """The residual stream of the samples before a layer, in batches.

    Args:
      batches: of the stream, each [B, T, D].
      samples: whose positions and documents they have.
      step: of training.
    """

    def __init__(
        self, batches: list[Float[np.ndarray, "B T D"]], samples: Batch, step: int
    ) -> None:
        self._batches, self._step = batches, step
        size = len(batches[0])
        starts = range(0, len(samples["inputs"]), size)
        self._places = [
            tuple(samples[name][start : start + size] for name in ("positions", "segment_ids"))
            for start in starts
        ]

    def observe(
        self,
        block: Block,
        values: Mapping[str, jax.Array],
        paths: tuple[str, ...],
        *,
        products: bool,
    ) -> _Sums:
        """Returns the sums over what projections of a layer multiply."""
        layer = _split(block, values)
        found = (
            _observe(*layer, x, *places, self._step, paths=paths, products=products)
            for x, places in zip(self._batches, self._places, strict=True)
        )
        return functools.reduce(lambda one, other: _add(one, other), found)

    def advance(self, block: Block, values: Mapping[str, jax.Array]) -> None:
        """Goes on to behind the layer."""
        layer = _split(block, values)
        for number, places in enumerate(self._places):
            x = _forward(*layer, self._batches[number], *places, self._step)
            self._batches[number] = np.asarray(x)


class _Observed:
    """Stands in the place of a projection, and keeps what its kernel multiplies."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self.operand: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        self.operand = self._projection.operand(x)
        return self._projection(x)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("paths", "products"))
def _observe(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    step: Any,
    *,
    paths: tuple[str, ...],
    products: bool,
) -> _Sums:
    """The sums of a batch over the inputs of a layer's projections."""
    block: Block = nnx.merge(graphdef, state)
    observed = {}
    for path in paths:
        parent, _, name = path.rpartition("/")
        observed[path] = _Observed(_projection(block, path))
        setattr(_module(block, parent), name, observed[path])
    block(x, positions, segment_ids, None, step)
    sharing: dict[int, list[str]] = {}
    for path, each in observed.items():
        sharing.setdefault(id(each.operand), []).append(path)
    return {
        tuple(own): Statistics.of(
            observed[own[0]].operand.reshape(*x.shape[:2], -1), products=products
        )
        for own in sharing.values()
    }


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    step: Any,
) -> jax.Array:
    block: Block = nnx.merge(graphdef, state)
    return block(x, positions, segment_ids, None, step)[0]


def _permuted(
    recipe: Recipe, values: Mapping[str, jax.Array], by_path: Mapping[str, Statistics]
) -> tuple[dict[str, jax.Array], dict[str, Statistics]]:
    """A layer with the hidden units of its MLP in an order that serves n:m of the down projection.

    The order of no other projection's inputs is free in a layer: they are the residual stream, or
    heads that share keys.
    """
    assert isinstance(recipe.pattern, Pattern)
    down = f"{_DOWN}/{KERNEL}"
    order = _order(recipe.pattern, values[down], by_path[_DOWN])
    moved = {n: jnp.take(x, order, axis=_HIDDEN[n]) for n, x in values.items() if n in _HIDDEN}
    return {**values, **moved}, {**by_path, _DOWN: by_path[_DOWN].take(order)}


@functools.partial(jax.jit, static_argnums=0)
def _order(
    pattern: Pattern, weight: Float[Array, "I O"], statistics: Statistics
) -> Int[Array, " I"]:
    return _ria.order(_ria.scores(weight, statistics), pattern)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prune(
    recipe: Recipe, in_dims: int, kernel: Float[Array, "..."], statistics: Statistics | None
) -> tuple[Float[Array, "..."], Bool[Array, "..."], Bool[Array, ""]]:
    """A kernel with its mask, and whether the scores are numbers."""
    size = int(np.prod(kernel.shape[:in_dims]))
    pruned = one_shot.prune(recipe, kernel.reshape(size, -1), statistics)
    is_finite = jnp.all(jnp.isfinite(pruned.scores))
    return pruned.weight.reshape(kernel.shape), pruned.mask.reshape(kernel.shape), is_finite


_add = jax.jit(lambda one, other: jax.tree.map(jnp.add, one, other))


def _embedded(
    model_def: ModelDef, values: Mapping[str, jax.Array], samples: Batch, batch_size: int
) -> list[Float[np.ndarray, "B T D"]]:
    """The residual stream before the first layer."""
    abstract = {**model_def.params, **model_def.variables}
    first = {name: on_device(x) for name, x in values.items() if name.startswith(_EMBEDDINGS)}

    @jax.jit
    def embed(first: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return model_def.model({**abstract, **first}, {}, 0).embed(tokens, positions)

    tokens, positions = samples["inputs"], samples["positions"]
    return [
        np.asarray(embed(first, tokens[rows], positions[rows]))
        for start in range(0, len(tokens), batch_size)
        for rows in [slice(start, start + batch_size)]
    ]


def _blocks(model_def: ModelDef) -> Iterator[Any]:
    """The layers in order, with shapes of stacked arrays in place of their own."""
    for stack in model_def.abstract_model().stacks:
        for _ in range(stack.repeats):
            yield from stack.unit


def _split(block: Block, values: Mapping[str, jax.Array]) -> tuple[nnx.GraphDef, nnx.State]:
    """A layer with values by their paths in it."""
    graphdef, state = nnx.split(block)
    flat = [(path, values["/".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    return graphdef, nnx.from_flat_state(flat)


def _paths(start: str, block: Block, targets: Sequence[str]) -> tuple[str, ...]:
    """The paths of the projections of a layer that are pruned."""
    own = [name for name in targets if name.startswith(start)]
    for name in own:
        path = name.removeprefix(start).removesuffix(f"/{KERNEL}")
        if not isinstance(_module(block, path), Projection):
            raise ConfigError(f"--targets: {name} is of no projection, which alone are pruned")
    return tuple(name.removeprefix(start).removesuffix(f"/{KERNEL}") for name in own)


def _projection(block: Block, path: str) -> Projection:
    module: Projection = _module(block, path)
    return module


def _module(block: Block, path: str) -> Any:
    return functools.reduce(getattr, path.split("/"), block)


def on_device(x: jax.Array) -> jax.Array:
    """Returns an array of the host on one device, with no mesh."""
    device = jax.local_devices()[0]
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(device, memory_kind="device"))
