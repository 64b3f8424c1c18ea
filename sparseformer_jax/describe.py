"""What a config amounts to before any training: parameters, FLOPs, memory, density."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh, units
from sparseformer_jax.attention._cost import Cost
from sparseformer_jax.attention.base import Attention
from sparseformer_jax.training.optimizer import make_optimizer, make_schedule
from sparseformer_jax.training.state import ModelDef, TrainState, abstract_state
from sparseformer_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Costs:
    """The size and arithmetic of a model.

    Attributes:
      parameters: all of them.
      trainable: those that get gradients.
      forward_flops: of one token in a full sequence, in evaluation.
      passes: over the model in a training step, in forward passes: 3, or 1 where only what
        methods detach from it trains.
      own_flops: of a token in training, what methods compute beside attention, with its
        backward pass.
      training_flops: of a token in training, `passes` with the densities that it has, and those.
      densities: attended fraction of the (causal) pairs in evaluation, layer by layer.
    """

    parameters: int
    trainable: int
    forward_flops: float
    passes: int
    own_flops: float
    training_flops: float
    densities: tuple[float, ...]


def costs(config: ConfigDict, model_def: ModelDef) -> Costs:
    """Returns the costs of a config at its `data.seq_len`.

    Forward FLOPs of a token: 2 for each weight it is multiplied by, 4 N H for each key it
    attends to, and what methods compute besides.
    """
    model, seq_len = config.model, config.data.seq_len
    params = model_def.params
    weights = sum(v.size for v in params.values() if "in_dims" in v.get_metadata())
    if model.tie_embeddings:
        weights += model.vocab_size * model.embed_dim
    keys = (seq_len + 1) / 2 if model.is_causal else seq_len
    layers = list(model_def.abstract_model().attention_layers())
    evaluation, training = (
        [layer.cost(seq_len, is_training=is_training) for layer in layers]
        for is_training in (False, True)
    )

    def one_pass(costs: list[Cost]) -> float:
        pairs = 4 * model.num_heads * model.head_dim * keys
        return 2 * weights + pairs * sum(cost.density for cost in costs)

    passes = 3 if _through_model(model_def, layers) else 1
    own = sum(cost.own for cost in training)
    return Costs(
        parameters=sum(v.size for v in params.values()),
        trainable=sum(params[name].size for name in model_def.trainable()),
        forward_flops=one_pass(evaluation) + sum(cost.own for cost in evaluation),
        passes=passes,
        own_flops=own,
        training_flops=passes * one_pass(training) + own,
        densities=tuple(cost.density for cost in evaluation),
    )


def _through_model(model_def: ModelDef, layers: list[Attention]) -> bool:
    """Whether anything trains whose gradients come through the model."""

    def is_detached(name: str) -> bool:
        found = re.fullmatch(r"layers/(\d+)/attention/([^/]+)/.*", name)
        return found is not None and found[2] in layers[int(found[1])].detached

    names = (layer for name in model_def.trainable() for layer in model_def.names.of(name))
    return not all(map(is_detached, names))


def summary(config: ConfigDict, model_def: ModelDef) -> str:
    """Returns one line about a model, for the start of a run."""
    cost = costs(config, model_def)
    density = sum(cost.densities) / len(cost.densities)
    name = config.attention.name
    if model_def.targets:
        name = f"{name}, weights {config.sparsity.name} {' '.join(config.sparsity.targets)}"
    return (
        f"{name}: {units.count(cost.parameters)} parameters "
        f"({units.count(cost.trainable)} trainable), {units.count(cost.training_flops)}FLOP to "
        f"train on a token, attention density {density:.3f}"
    )


def describe(config: ConfigDict) -> str:
    """Returns the resolved config, and what it costs, as text for a person.

    The memory of activations is what the compiler plans for one training step on the
    platform this runs on.
    """
    sizes = config_lib.resolve_mesh(config.mesh, jax.device_count())
    with jax.set_mesh(mesh.make_mesh(sizes)):
        model_def = ModelDef(config)
        cost = costs(config, model_def)
        state_bytes, temporary_bytes = _memory(config, model_def)
    resolved = "\n".join(f"{key} = {value!r}" for key, value in config_lib.flatten(config).items())
    densities = "\n".join(f"  layer {i}: {d:.4f}" for i, d in enumerate(cost.densities))
    return (
        f"{resolved}\n\n"
        f"{summary(config, model_def)}\n"
        f"parameters: {cost.parameters:,} ({cost.trainable:,} trainable)\n"
        f"{_learned_state(model_def)}"
        f"{_sparsity(config, model_def)}"
        f"FLOPs per token: {units.count(cost.forward_flops)} forward, "
        f"{units.count(cost.training_flops)} training{_of_training(cost)}\n"
        f"memory per device: {units.size(state_bytes)} state, {units.size(temporary_bytes)} "
        f"gradients and activations (compiled for {jax.default_backend()}, mesh {_mesh(sizes)})\n"
        f"{_cache(config, model_def)}"
        f"attention density at {config.data.seq_len} tokens:\n{densities}"
    )


def _of_training(cost: Costs) -> str:
    """What else there is to training than three times a forward pass."""
    parts = []
    if cost.passes == 1:
        parts.append("forward alone: no gradient goes through the model")
    if cost.own_flops:
        parts.append(f"{units.count(cost.own_flops)} of it the method's own, beside attention")
    return "".join(f"; {part}" for part in parts)


def _learned_state(model_def: ModelDef) -> str:
    """A line for each variable that no gradient moves, stacked as it scans."""
    return "".join(
        f"learned state: {name} {v.dtype}{list(v.shape)}, {v.type.__name__}, not by gradients\n"
        for name, v in model_def.variables.items()
    )


def _sparsity(config: ConfigDict, model_def: ModelDef) -> str:
    """Lines on sparse weights: how many, what is kept, what training with them costs."""
    if not model_def.targets:
        return ""
    sizes = {name: model_def.params[name].size for name in model_def.targets}
    patterns = {name: target.pattern for name, target in model_def.targets.items()}
    total = sum(sizes.values())
    text = f"sparse weights: {units.count(total)}, {config.sparsity.name}"
    if all(pattern is not None for pattern in patterns.values()):
        kept = sum(sizes[name] * pattern.density for name, pattern in patterns.items() if pattern)
        shown = ", ".join(sorted({str(pattern) for pattern in patterns.values()}))
        share = training_flops(config, model_def) / training_flops(config, model_def, dense=True)
        text += (
            f", {shown}, {kept / total:.3f} kept; all steps cost {share:.3f} of a dense run's FLOPs"
        )
    in_layer = sum(math.prod(model_def.layer_shape(name)) for name in model_def.targets)
    layers = len({model_def.names.of(name)[0].split("/")[1] for name in model_def.targets})
    masks = model_def.sparsity.mask_itemsize * in_layer // layers
    return f"{text}; masks of one layer at a time, {units.size(masks)}\n"


def training_flops(config: ConfigDict, model_def: ModelDef, *, dense: bool = False) -> float:
    """Returns the FLOPs of all steps of a run, of which sparse weights need the part they use.

    Hardware that skips what is dropped needs as many; others need those of a dense run.
    """
    train, steps = config.train, np.arange(config.train.num_steps)
    tokens, cost = train.batch_size * config.data.seq_len, costs(config, model_def)
    all_steps = cost.training_flops * len(steps)
    for name, target in () if dense else model_def.targets.items():
        if target.pattern is not None:
            used = model_def.sparsity.training_density(target.pattern, steps)
            dropped = model_def.params[name].size * float(np.sum(1 - used))
            all_steps -= 2 * cost.passes * dropped
    return tokens * all_steps


def _cache(config: ConfigDict, model_def: ModelDef) -> str:
    """A line on what a sequence costs while it is continued."""
    if not config.model.is_causal:
        return ""
    model = model_def.abstract_model()
    seq_len = config.data.seq_len
    cache = jax.eval_shape(lambda: model.init_cache(1, seq_len))
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return (
        f"cache to generate: {units.size(num_bytes)} for a sequence of {seq_len} tokens, "
        f"{num_bytes / seq_len:,.0f} bytes a token\n"
    )


def _memory(config: ConfigDict, model_def: ModelDef) -> tuple[int, int]:
    """Bytes of the state and of all temporaries on one device."""
    compiled, state = compile_step(config, model_def)
    memory: Any = compiled.memory_analysis()
    return _local_bytes(state), memory.temp_size_in_bytes


def compile_step(config: ConfigDict, model_def: ModelDef) -> tuple[jax.stages.Compiled, TrainState]:
    """Returns a training step on the current mesh, and the shapes of its state; nothing is run."""
    num_steps = config.train.num_steps
    trainable = {name: model_def.params[name] for name in model_def.trainable()}
    optimizer = make_optimizer(config.optimizer, num_steps, trainable)
    step = make_train_step(model_def, optimizer, make_schedule(config.optimizer, num_steps))
    device_mesh = jax.sharding.get_mesh()
    state = abstract_state(model_def, optimizer, device_mesh)
    batch = abstract_batch(config, device_mesh)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state


def abstract_batch(
    config: ConfigDict, device_mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a training batch [A, B/A, T]."""
    pieces = config.train.accumulation_steps
    shape = (pieces, config.train.batch_size // pieces, config.data.seq_len)
    sharding = jax.NamedSharding(device_mesh, mesh.spec(None, "batch", "seq"))
    names = ("inputs", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in names}
    return batch | {"weights": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}


def _local_bytes(state: TrainState) -> int:
    def local(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(map(local, jax.tree.leaves(state)))


def _mesh(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}:{sizes[axis]}" for axis in mesh.AXES)
