"""Which weights are sparse, and every mistake in naming them, in one line."""

import jax
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import validate
from sparseformer_jax.sparsity.base import Target
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.training.state import ModelDef


def config_of(name, *targets, **options):
    config = presets.baseline("tiny")
    config.sparsity = registry.method_config("sparsity", name, targets=targets, **options)
    return config


def targets_of(config, sizes):
    devices = jax.devices()[: 2 if sizes else 1]
    with jax.set_mesh(mesh.make_mesh(sizes, devices)):
        return ModelDef(config).targets


def checked_targets(config, sizes):
    validate(config)
    return targets_of(config, sizes)


def mistake(config, sizes=None):
    with pytest.raises(ConfigError) as error:
        checked_targets(config, sizes or {})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("ff=2/4",), "sparsity.targets='ff=2/4': pattern '2/4': must be n:m, n kept of every"),
        (("ff=5:4",), "sparsity.targets='ff=5:4': pattern 5:4: keeps 5 of 4; n must be from 1"),
        (("=2:4",), "sparsity.targets='=2:4': must be NAMES=n:m, as 'ff=2:4'"),
        (("mlp/(up=2:4",), "sparsity.targets='mlp/(up=2:4': neither one of ff, qkv, all nor a"),
        (("fff=2:4",), "sparsity.targets='fff=2:4': matches no weight; did you mean ff?"),
        (("ff=2:4", "layers/7/=2:4"), "sparsity.targets='layers/7/=2:4': matches no weight"),
        (("embedding=2:4",), "sparsity.targets='embedding=2:4': matches embedding/table, which is"),
        (
            ("norm=2:4",),
            "sparsity.targets='norm=2:4': matches final_norm/scale, which",
        ),
        (("ff=2:3",), "sparsity.targets='ff=2:3': groups of 3 do not divide the 128 entries that "),
    ],
)
def test_mistakes(targets, message):
    assert mistake(config_of("fixed", *targets)).startswith(message)


@pytest.mark.parametrize("name", ["pgf", "maskllm"])
def test_what_is_learned_needs_a_pattern(name):
    wanted = "sparsity.targets='ff': has no pattern; write NAMES=n:m, as 'ff=2:4'"
    assert mistake(config_of(name, "ff")) == wanted


def test_no_targets():
    wanted = "sparsity.targets=(): nothing is made sparse; name weights, as 'ff=2:4'"
    assert mistake(config_of("fixed")) == mistake(config_of("pgf")) == wanted


def test_the_head_stays_dense():
    config = config_of("fixed", "head/kernel=2:4")
    config.model.tie_embeddings = False
    assert "matches head/kernel, which is no projection of a layer;" in mistake(config)


def test_too_many_masks_of_a_group():
    message = mistake(config_of("maskllm", "ff=2:4", "qkv=8:16"))
    assert message.startswith("sparsity.targets='qkv=8:16': pattern 8:16: 12,870 masks of a group")


def test_groups_of_every_stage_must_divide():
    config = config_of("pgf", "ff=1:16", recipe="sdgf_geometric", decay_steps=8)
    assert "groups of 128 do not divide the 64 entries" in mistake(config)
    config.sparsity.recipe = "sdgf_stepwise"
    assert len(checked_targets(config, {})) == 3


@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_devices_do_not_cut_a_group(axis):
    """FSDP divides what "up" sums over, tensor parallelism what "down" does."""
    name, size = {"fsdp": ("up", 64), "tensor": ("down", 128)}[axis]
    config = config_of("fixed", f"mlp/{name}=2:{size}")
    assert len(targets_of(config, {})) == 1
    wanted = f"groups of {size} would be cut by the 2 devices that share the {size} entries"
    message = mistake(config, {axis: 2})
    assert wanted in message
    assert message.endswith(f"make it a multiple of {2 * size}")


def test_the_first_target_that_fits_counts():
    """Groups lie along the last axis that a product sums over: a head's of "out"."""
    found = targets_of(config_of("fixed", "layers/1/mlp/up=1:8", "ff=2:4", "out=1:4"), {})
    named = {name.rpartition("/kernel")[0]: target for name, target in found.items()}
    first, second = (f"stacks/{stack}/unit/0" for stack in (0, 1))
    assert named == {
        f"{first}/mlp/gate": Target(Pattern(2, 4), -2, 2),
        f"{first}/mlp/up": Target(Pattern(2, 4), -2, 2),
        f"{first}/mlp/down": Target(Pattern(2, 4), -2, 2),
        f"{first}/attention/out": Target(Pattern(1, 4), -2, 3),
        f"{second}/mlp/gate": Target(Pattern(2, 4), -2, 2),
        f"{second}/mlp/up": Target(Pattern(1, 8), -2, 2),
        f"{second}/mlp/down": Target(Pattern(2, 4), -2, 2),
        f"{second}/attention/out": Target(Pattern(1, 4), -2, 3),
    }


def test_queries_sum_over_the_width():
    (query, *_) = targets_of(config_of("fixed", "qkv=2:4"), {}).values()
    assert query == Target(Pattern(2, 4), -3, 3)
