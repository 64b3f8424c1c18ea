"""A config is refused in one line, compared key by key and saved exactly."""

import jax
import pytest
from ml_collections import ConfigDict

from sparseformer_jax import config as config_lib
from sparseformer_jax import config_flags, default_config, registry
from sparseformer_jax.config import ConfigError
from sparseformer_jax.config_ranges import RANGES, check_ranges
from sparseformer_jax.config_rules import REMAT_POLICIES

TOY = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Options:
    window_size: int = 4

def check(options, config):
    if config.data.seq_len % options.window_size:
        raise ValueError(f"window_size={options.window_size}: must divide data.seq_len")
"""


def make(**changes: object) -> ConfigDict:
    """Returns the default config with keys changed, `model__num_layers=2`."""
    config = default_config.get_config()
    with config.unlocked():
        for key, value in changes.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def refusal(config: ConfigDict, **counts: int) -> str:
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(config, **({"num_devices": 1} | counts))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_default_is_valid():
    config_lib.validate(default_config.get_config(), num_devices=1)


def test_devices_and_processes_are_jaxs_by_default():
    config_lib.validate(make(mesh__fsdp=jax.device_count()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm": "rmsnrom"}, "model.norm='rmsnrom': not one of rmsnorm, layernorm; did you mean rmsnorm?"),
        ({"model__remat": "dots"}, "model.remat='dots': not one of none, full, everything_saveable"),
        ({"model__compute_dtype": "bf16"}, "model.compute_dtype='bf16': not one of float32, bfloat16"),
        ({"model__compute_dtype": "float16"}, "model.compute_dtype='float16': not one of float32, bfloat16; did you mean bfloat16?"),
        ({"model__num_layers": 0}, "model.num_layers=0: must be from 1 to 10,000"),
        ({"model__attention_soft_cap": -1.0}, "model.attention_soft_cap=-1.0: must be from 0.01 to"),
        ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm=-1.0: must be from 0 to"),
        ({"model__dropout": 1.0}, "model.dropout=1.0: must be from 0 to 0.99"),
        ({"optimizer__final_fraction": 2.0}, "optimizer.final_fraction=2.0: must be from 0 to 1"),
        ({"model__num_kv_heads": 3}, "model.num_heads=4: must be a multiple of model.num_kv_heads=3"),
        ({"model__head_dim": 31}, "model.head_dim=31: rope needs an even number"),
        ({"model__rope_scaling": "ntk"}, "model.rope_scaling='ntk': not one of none, linear, llama3, yarn"),
        ({"model__rope_factor": 8.0}, "model.rope_factor=8.0: model.rope_scaling='none' does not read it; set it to 1"),
        ({"model__rope_attention_factor": 1.2}, "model.rope_attention_factor=1.2: model.rope_scaling='none' does not read it; set it to None"),
        ({"model__position": "none", "model__rope_scaling": "linear"}, "model.rope_scaling='linear': model.position='none' does not read it; set it to 'none'"),
        ({"model__rope_scaling": "llama3", "model__rope_low_freq_factor": 4.0}, "model.rope_low_freq_factor=4.0: must be below model.rope_high_freq_factor=4.0"),
        ({"model__rope_scaling": "yarn", "model__rope_beta_fast": 0.5}, "model.rope_beta_slow=1.0: must be below model.rope_beta_fast=0.5"),
        ({"model__rope_scaling": "yarn", "model__rope_theta": 1.0}, "model.rope_theta=1.0: all pairs turn alike; yarn needs more"),
        ({"model__partial_rotary_factor": 0.3}, "model.partial_rotary_factor=0.3: rotates 9.6 of model.head_dim=32 entries; take an even number, as 10/32"),
        ({"model__partial_rotary_factor": 0.01}, "model.partial_rotary_factor=0.01: rotates 0.32 of model.head_dim=32 entries; take an even number, as 2/32"),
        ({"model__rope_local_layers": (1,)}, "model.rope_local_layers=(1,): goes together with model.rope_local_theta=None; set both or neither"),
        ({"model__rope_local_theta": 1e4}, "model.rope_local_layers=(): goes together with model.rope_local_theta=10000.0; set both or neither"),
        ({"model__rope_local_theta": 1e4, "model__rope_local_layers": (1, 4)}, "model.rope_local_layers=(1, 4): names [4]; the layers are 0 to 3"),
        ({"model__rope_local_layers": ("1",)}, "model.rope_local_layers=('1',): must be tuple[int, ...], not tuple[str]"),
        ({"model__is_causal": False}, "model.is_causal=False: predicting the next token"),
        ({"model__position": "learned", "data__seq_len": 4096}, "model.max_positions=2048: fewer learned positions"),
        ({"data__files": (5,)}, "data.files=(5,): must be tuple[str, ...], not tuple[int]; a name that is a number needs quotes"),
        ({"data__text_field": ""}, "data.text_field='': empty; name the field"),
        ({"data__files": ("a",), "data__tfds_name": "pg19"}, "data.tfds_name='pg19': data.files is set too"),
        ({"data__validation_fraction": 0.9, "data__test_fraction": 0.2}, "data.test_fraction=0.2: nothing is left"),
        ({"train__accumulation_steps": 3}, "train.batch_size=8: must be a multiple of train.accumulation_steps=3"),
        ({"train__profile_steps": (3,)}, "train.profile_steps=(3,): must be (first, last) with"),
        ({"train__num_steps": 2, "optimizer__warmup_steps": 0, "train__profile_steps": (5, 9)}, "train.profile_steps=(5, 9): must be (first, last) with 0 <= first < last <= train.num_steps=2"),
        ({"train__trainable": "("}, "train.trainable='(': neither 'all' nor a regular expression"),
        ({"optimizer__warmup_steps": 2000}, "optimizer.warmup_steps=2000: more than train.num_steps=1000"),
        ({"optimizer__schedule": "wsd", "optimizer__decay_steps": 950}, "optimizer.decay_steps=950: with warmup_steps=100"),
        ({"attention__name": "dnse"}, "attention.name='dnse': not one of"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(changes, message):
    assert refusal(make(**changes)).startswith(message)


def test_every_number_has_a_finite_range():
    """And NaN, infinity and what lies beyond either end are refused, naming the field."""
    config = default_config.get_config()
    numbers = {key for key, kind in config_flags.keys(config).items() if kind in (int, float)}
    assert numbers == RANGES.keys() | {f"mesh.{axis}" for axis in config.mesh}
    values = config_lib.flatten(config)
    check_ranges(values)
    for field, (low, high) in RANGES.items():
        for value in (float("nan"), float("inf"), -float("inf"), low - 1, high * 2, 10**30):
            with pytest.raises(
                ConfigError, match=f"{field}={value}: must be from".replace("+", ".")
            ):
                check_ranges(values | {field: value})


@pytest.mark.parametrize("option", ["vert_stride", "local_blocks", "head_sliding_offset"])
def test_options_that_overflow_are_refused(option):
    config = make()
    config.attention = ConfigDict({"name": "s2", option: 10**12})
    message = f"attention.{option}=1000000000000: must be from -4,194,304 to 4,194,304"
    assert refusal(config) == message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_that_are_no_finite_number_are_refused(add_attention, value):
    add_attention("toy", TOY.replace("int = 4", "float = 4.0"))
    config = make()
    config.attention = ConfigDict({"name": "toy", "window_size": value})
    assert refusal(config) == f"attention.window_size={value}: must be a finite number"


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        ({"mesh__data": 16}, 8, "mesh=context:1,data:16,fsdp:1,tensor:1: larger than the devices: its axes take 16 of 8; make their product 8"),
        ({"mesh__data": 3}, 8, "mesh=context:1,data:3,fsdp:1,tensor:1: does not fit the devices"),
        ({"mesh__tensor": -1}, 8, "mesh.tensor=-1: only one axis takes the rest, and mesh.data does"),
        ({"mesh__fsdp": 0}, 8, "mesh.fsdp=0: must be positive, or -1"),
        ({"mesh__tensor": 8}, 8, "model.num_heads=4: must be a multiple of mesh.tensor=8"),
        ({"mesh__context": 3}, 3, "data.seq_len=512: must be a multiple of mesh.context=3"),
        ({}, 16, "train.batch_size=8: must be a multiple of mesh.data * mesh.fsdp * train.accumulation_steps=16"),
        ({"eval__batch_size": 4}, 8, "eval.batch_size=4: must be a multiple of mesh.data * mesh.fsdp=8"),
    ],
)  # fmt: skip
def test_wrong_meshes_are_refused(changes, counts, message):
    assert refusal(make(**changes), num_devices=counts).startswith(message)


def test_every_process_reads_rows_of_its_own():
    config = make(mesh__data=1, mesh__tensor=2)
    message = refusal(config, num_devices=2, num_processes=2)
    assert message.startswith("mesh.data=1, mesh.fsdp=1: their product must be a multiple of the 2")


def test_mesh_is_resolved():
    mesh = make(mesh__tensor=2).mesh
    resolved = {"data": 4, "fsdp": 1, "tensor": 2, "context": 1}
    assert config_lib.resolve_mesh(mesh, num_devices=8) == resolved


def test_unknown_missing_and_mistyped_keys_are_refused():
    config = make()
    config.model.num_layer = 3
    assert refusal(config) == "model.num_layer: no such key; did you mean num_layers?"
    config = make()
    del config.optimizer.b1
    assert refusal(config) == "optimizer.b1: missing; start from default_config"
    config = make()
    config.model = ConfigDict({**config.model, "num_layers": 2.0})
    assert refusal(config) == "model.num_layers=2.0: must be int, not float"
    config = make()
    del config["model"]
    config.model = 3
    assert refusal(config) == "model=3: must be a section of keys"


def test_a_method_checks_its_options_against_the_config(add_attention):
    add_attention("toy", TOY)
    config = make()
    config.attention = registry.method_config("attention", "toy", window_size=3)
    message = "attention.window_size=3: must divide data.seq_len"
    assert refusal(config) == message


def test_every_remat_name_is_a_policy():
    for name in REMAT_POLICIES:
        policy = getattr(jax.checkpoint_policies, name)
        jax.checkpoint(lambda x: x * 2.0, policy=policy)(1.0)


def test_diff_names_the_keys_that_differ():
    old, new = make(), make(model__num_layers=6, data__files=("a",))
    del old.model.remat
    new.attention.window = 8
    assert config_lib.diff(old, new) == {
        "model.num_layers": "4 -> 6",
        "data.files": "() -> ('a',)",
        "attention.window": "absent -> 8",
    }
    assert config_lib.diff(old, old) == {}


def test_json_round_trip_is_exact():
    config = make(train__profile_steps=(3, 5), model__attention_scale=0.1)
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    assert again.train.profile_steps == (3, 5)
    assert again.model.logits_soft_cap is None
    again.model.logits_soft_cap = 30.0
    with pytest.raises(TypeError):
        again.model.logits_soft_cap = "high"


def test_a_value_that_flags_set_to_none_can_be_saved():
    config = make()
    config.attention = ConfigDict({"name": "dense", "window": 8})
    config_flags.override(config, ["train.py", "--config.attention.window=None"])
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    assert again.attention.window is None
    assert again.attention.get_type("window") is int


def test_a_saved_config_is_completed_with_newer_keys():
    config = default_config.get_config()
    old = config_lib.from_json(config_lib.to_json(config))
    del old["init_from"]
    del old.model["attention_soft_cap"]
    completed = config_lib.completed(old)
    assert config_lib.flatten(completed) == config_lib.flatten(config)
    assert completed.model.get_type("attention_soft_cap") is float
