"""The rules a config's values obey, alone and together: one function a topic.

Each takes the flattened config, `{"model.num_heads": 4, ...}`, and raises ConfigError.
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from sparseformer_jax.checks import ConfigError, check_choice
from sparseformer_jax.config_ranges import check_ranges

# No float16: gradients fall below its smallest number unless the loss is scaled.
_DTYPES = ("float32", "bfloat16")

# Every other name in jax.checkpoint_policies is a factory that takes arguments.
REMAT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)

_CHOICES = {
    "model.position": ("rope", "learned", "none"),
    "model.rope_scaling": ("none", "linear", "llama3", "yarn"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.mlp": ("swiglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "model.remat": ("none", "full", *REMAT_POLICIES),
    "model.param_dtype": _DTYPES,
    "model.compute_dtype": _DTYPES,
    "model.softmax_dtype": _DTYPES,
    "optimizer.name": ("adamw", "muon"),
    "optimizer.schedule": ("cosine", "constant", "wsd"),
    "eval.split": ("train", "validation", "test"),
}

# The first must be a multiple of the second.
_MULTIPLES = (
    ("model.num_heads", "model.num_kv_heads"),
    ("train.batch_size", "train.accumulation_steps"),
    ("model.num_heads", "mesh.tensor"),
    ("model.num_kv_heads", "mesh.tensor"),
    ("model.mlp_dim", "mesh.tensor"),
    ("model.vocab_size", "mesh.tensor"),
    ("model.embed_dim", "mesh.fsdp"),
    ("data.seq_len", "mesh.context"),
)


def check_values(values: dict[str, Any]) -> None:
    """Checks every value alone: its choices and its range."""
    for field, choices in _CHOICES.items():
        check_choice(field, values[field], choices)
    check_ranges(values)


def check_model(values: dict[str, Any]) -> None:
    """Checks what the position encoding and the loss ask of the model."""
    seq_len, rows = values["data.seq_len"], values["model.max_positions"]
    if values["model.position"] == "learned" and rows < seq_len:
        raise ConfigError(
            f"model.max_positions={rows}: fewer learned positions than"
            f" data.seq_len={seq_len}; make it {seq_len} or more"
        )
    if not values["model.is_causal"]:
        raise ConfigError("model.is_causal=False: predicting the next token needs a causal model")


# What each scaling reads, beside the factor: the first must be below the second.
_TURNS_OF_SCALINGS = {
    "llama3": ("model.rope_low_freq_factor", "model.rope_high_freq_factor"),
    "yarn": ("model.rope_beta_slow", "model.rope_beta_fast"),
}


def check_rotary(values: dict[str, Any]) -> None:
    """Checks which entries turn, and that what is set of rotary positions is read."""
    position, scaling = values["model.position"], values["model.rope_scaling"]
    if position == "rope":
        _check_rotated(values["model.head_dim"], values["model.partial_rotary_factor"])
    else:
        rotary = {"rope_scaling": "none", "partial_rotary_factor": 1, "rope_local_layers": ()}
        _check_unread(values, rotary, f"model.position={position!r}")
    if scaling == "none":
        _check_unread(values, {"rope_factor": 1}, "model.rope_scaling='none'")
    if scaling != "yarn":
        _check_unread(values, {"rope_attention_factor": None}, f"model.rope_scaling={scaling!r}")
    if scaling in _TURNS_OF_SCALINGS:
        low, high = _TURNS_OF_SCALINGS[scaling]
        if values[low] >= values[high]:
            raise ConfigError(f"{low}={values[low]}: must be below {high}={values[high]}")
    if scaling == "yarn" and values["model.rope_theta"] == 1:
        raise ConfigError("model.rope_theta=1.0: all pairs turn alike; yarn needs more than 1")
    _check_local_layers(
        values["model.rope_local_layers"],
        values["model.rope_local_theta"],
        values["model.num_layers"],
    )


def _check_unread(values: dict[str, Any], defaults: dict[str, Any], because: str) -> None:
    """Refuses values of the model that another one leaves without meaning."""
    for key, default in defaults.items():
        value = values[f"model.{key}"]
        if value != default:
            raise ConfigError(
                f"model.{key}={value!r}: {because} does not read it; set it to {default!r}"
            )


def _check_rotated(head_dim: int, part: float) -> None:
    if part == 1 and head_dim % 2:
        raise ConfigError(f"model.head_dim={head_dim}: rope needs an even number")
    size = head_dim * part
    # A third of 48 is 16 only but for rounding.
    if abs(size - round(size)) > 1e-6 * head_dim or round(size) % 2 or size < 1:
        raise ConfigError(
            f"model.partial_rotary_factor={part}: rotates {size:g} of model.head_dim={head_dim}"
            f" entries; take an even number, as {max(2, 2 * round(size / 2))}/{head_dim}"
        )


def _check_local_layers(layers: tuple[int, ...], theta: float | None, num_layers: int) -> None:
    if bool(layers) != (theta is not None):
        raise ConfigError(
            f"model.rope_local_layers={layers}: goes together with"
            f" model.rope_local_theta={theta}; set both or neither"
        )
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ConfigError(
            f"model.rope_local_layers={layers}: names {outside}; the layers are 0 to"
            f" {num_layers - 1}"
        )


def check_start(values: dict[str, Any]) -> None:
    """Checks that the settings of another run have been taken, where they were to be."""
    if values["init_settings"]:
        raise ConfigError(
            "init_settings=True: the settings of init_from are not here yet; train.py takes them"
        )


def check_data(values: dict[str, Any]) -> None:
    """Checks that there is one source of text and something left to train on."""
    if values["data.files"] and values["data.tfds_name"]:
        raise ConfigError(
            f"data.tfds_name={values['data.tfds_name']!r}: data.files is set too; clear one of them"
        )
    if not values["data.text_field"]:
        raise ConfigError(
            "data.text_field='': empty; name the field or feature that holds the text, e.g. 'text'"
        )
    held_out = values["data.validation_fraction"] + values["data.test_fraction"]
    if held_out >= 1:
        raise ConfigError(
            f"data.test_fraction={values['data.test_fraction']}: nothing is left to"
            f" train on beside data.validation_fraction="
            f"{values['data.validation_fraction']}"
        )


def check_steps(values: dict[str, Any]) -> None:
    """Checks what is told in steps, and the pattern of what trains."""
    num_steps = values["train.num_steps"]
    used = values["optimizer.warmup_steps"]
    if used > num_steps:
        raise ConfigError(f"optimizer.warmup_steps={used}: more than train.num_steps={num_steps}")
    decay = values["optimizer.decay_steps"]
    if values["optimizer.schedule"] == "wsd" and used + decay > num_steps:
        raise ConfigError(
            f"optimizer.decay_steps={decay}: with warmup_steps={used} more than"
            f" train.num_steps={num_steps}"
        )
    profile = values["train.profile_steps"]
    if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1] <= num_steps):
        raise ConfigError(
            f"train.profile_steps={profile}: must be (first, last) with 0 <= first < last <="
            f" train.num_steps={num_steps}, or () for none"
        )
    try:
        re.compile(values["train.trainable"])
    except re.error as error:
        raise ConfigError(
            f"train.trainable={values['train.trainable']!r}: neither 'all' nor a"
            f" regular expression: {error}"
        ) from None


def check_multiples(values: dict[str, Any], num_processes: int) -> None:
    """Checks that heads, widths and batches divide among devices and processes."""
    for field, divisor in _MULTIPLES:
        _check_multiple(values, field, divisor, values[divisor])
    shards = values["mesh.data"] * values["mesh.fsdp"]
    pieces = shards * values["train.accumulation_steps"]
    by_shards = "mesh.data * mesh.fsdp"
    by_pieces = f"{by_shards} * train.accumulation_steps"
    _check_multiple(values, "train.batch_size", by_pieces, pieces)
    _check_multiple(values, "eval.batch_size", by_shards, shards)
    if shards % num_processes:
        raise ConfigError(
            f"mesh.data={values['mesh.data']}, mesh.fsdp={values['mesh.fsdp']}: their product"
            f" must be a multiple of the {num_processes} processes, each of which reads rows"
        )


def _check_multiple(values: dict[str, Any], field: str, divisor: str, number: int) -> None:
    if values[field] % number:
        raise ConfigError(f"{field}={values[field]}: must be a multiple of {divisor}={number}")


def resolve_mesh(mesh: ConfigDict, num_devices: int) -> dict[str, int]:
    """Returns the number of devices along each mesh axis, with -1 worked out.

    Raises ConfigError unless the product of the axes is `num_devices`.
    """
    axes = dict(mesh)
    free = [axis for axis, size in axes.items() if size == -1]
    for axis, size in axes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{axis}={size}: must be positive, or -1: the rest")
    if len(free) > 1:
        raise ConfigError(
            f"mesh.{free[1]}=-1: only one axis takes the rest, and mesh.{free[0]} does"
        )
    taken = math.prod(size for size in axes.values() if size != -1)
    if free and num_devices % taken == 0:
        return axes | {free[0]: num_devices // taken}
    if taken == num_devices:
        return axes
    shape = ",".join(f"{axis}:{size}" for axis, size in axes.items())
    relation = "larger than" if taken > num_devices else "does not fit"
    raise ConfigError(
        f"mesh={shape}: {relation} the devices: its axes take {taken} of"
        f" {num_devices}; make their product {num_devices}, or set one axis to -1"
    )
