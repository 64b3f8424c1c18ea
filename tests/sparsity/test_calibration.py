"""Calibration layer by layer, against layers run by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import default_config, registry
from sparseformer_jax.attention._routed_layers import SharedOutput
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.sparsity import calibration
from sparseformer_jax.sparsity.nm import Pattern
from sparseformer_jax.sparsity.one_shot import Recipe
from sparseformer_jax.training.state import ModelDef
from tests.model.harness import SMALL, normal, randomized, small_config

WANDA = Recipe("wanda", Pattern(1, 2))


@pytest.fixture(scope="module")
def model_def():
    config = default_config.get_config()
    config.model.update(SMALL | {"num_layers": 2})
    return ModelDef(config)


@pytest.fixture(scope="module")
def values(model_def):
    """Parameters by layer, none zero."""
    state = nnx.state(randomized(model_def.abstract_model))
    flat = {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(state)}
    return model_def.to_layers(flat)


@pytest.fixture(scope="module")
def samples():
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (5, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    segments = 1 + (np.arange(12) >= 7) * np.ones_like(tokens)
    return {"inputs": tokens, "positions": positions, "segment_ids": segments}


def prune_model(*arguments):
    return calibration.prune_model(*arguments, step=0, batch_size=2)


def pruned(*arguments):
    found = prune_model(*arguments)
    return {name: (np.asarray(weight), np.asarray(mask)) for name, weight, mask in found}


def masked_by_hand(kernel, x, in_dims):
    """Wanda's mask of 1:2 for inputs x [B, T, ..]."""
    flat = np.asarray(x).reshape(-1, np.prod(kernel.shape[:in_dims]))
    scores = np.abs(kernel.reshape(flat.shape[1], -1)) * np.linalg.norm(flat, axis=0)[:, None]
    first, second = scores[::2], scores[1::2]
    return np.stack([first > second, first <= second], axis=1).reshape(kernel.shape)


def test_layers_see_pruned_ones_before_and_themselves_dense(model_def, values, samples):
    targets = [name for name in values if name.endswith("/kernel") and name.startswith("layers/")]
    found = pruned(model_def, values, targets, WANDA, samples)
    assert found.keys() == set(targets)
    params = model_def.from_layers(values)
    tokens, positions, segments = (jnp.asarray(x) for x in samples.values())
    model = model_def.model(params, {}, 0)
    x = model.embed(tokens, positions)
    for number, block in enumerate(model.blocks()):
        start = f"layers/{number}"
        seen = block.attention_norm(x)
        attended = x + block.attention(seen, positions, segments).output
        normed = block.mlp_norm(attended)
        hidden = jax.nn.silu(block.mlp.gate(normed)) * block.mlp.up(normed)
        inputs = {"attention/query": seen, "attention/value": seen, "mlp/up": normed}
        for path, own in (inputs | {"mlp/down": hidden}).items():
            weight, mask = found[f"{start}/{path}/kernel"]
            np.testing.assert_array_equal(weight, values[f"{start}/{path}/kernel"])
            np.testing.assert_array_equal(mask, masked_by_hand(weight, own, 1), err_msg=path)
        for name, (weight, mask) in found.items():
            if name.startswith(start):
                _, _, part, projection, _ = name.split("/")
                getattr(getattr(block, part), projection).kernel[...] = jnp.asarray(weight * mask)
        x, _ = block(x, positions, segments, None)


def test_permuted_hidden_units_leave_the_model_as_it_is(model_def, values, samples):
    pattern, masks = Pattern(2, 4), {}
    layers = dict(values)
    targets = [f"layers/{number}/mlp/{name}/kernel" for number in (0, 1) for name in ("up", "down")]
    recipe = Recipe("ria", pattern, permute=True)
    for name, value, mask in prune_model(model_def, values, targets, recipe, samples):
        layers[name], masks[name] = jnp.asarray(value), mask
    assert masks.keys() == {*targets, "layers/0/mlp/gate/kernel", "layers/1/mlp/gate/kernel"}
    moved = "layers/0/mlp/down/kernel"
    assert (layers[moved] != values[moved]).any()
    tokens = jnp.asarray(samples["inputs"])
    before, after = (
        model_def.model(model_def.from_layers(own), {}, 0)(tokens).logits
        for own in (values, layers)
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert (np.asarray(masks[moved]).reshape(7, 4, 20).sum(axis=1) == 2).all()


def test_what_reads_no_text_gets_none(model_def, values):
    name = "layers/1/attention/out/kernel"
    ((found, (_, mask)),) = pruned(
        model_def, values, [name], Recipe("magnitude", Pattern(1, 2)), None
    ).items()
    assert found == name
    np.testing.assert_array_equal(mask, masked_by_hand(values[name], np.ones((1, 24)), 2))


def test_numbers_that_are_none(model_def, values, samples):
    name = "layers/0/mlp/down/kernel"
    broken = {**values, name: values[name].at[0, 0].set(jnp.nan)}
    with pytest.raises(NonFiniteError, match=f"{name}: its scores are not finite"):
        pruned(model_def, broken, [name], WANDA, samples)


def test_what_is_no_projection(model_def, values, samples):
    with pytest.raises(ConfigError, match="mlp_norm/scale is of no projection"):
        pruned(model_def, values, ["layers/0/mlp_norm/scale"], WANDA, samples)


def test_the_operand_of_a_shared_output_is_behind_its_matrix():
    config = small_config()
    output = randomized(lambda: SharedOutput(config, rngs=nnx.Rngs(0)))
    x = jnp.asarray(normal(0, 2, 5, config.num_heads, config.head_dim))
    product = jnp.einsum("btnh,nhd->btd", output.operand(x), output.kernel[...])
    np.testing.assert_allclose(product, output(x), rtol=1e-4, atol=1e-5)


def test_draws_are_distinct_and_repeat(tmp_path):
    config = default_config.get_config()
    (tmp_path / "train.txt").write_text("".join(chr(97 + i % 26) * (i % 7) for i in range(300)))
    config.data.update({"files": (str(tmp_path / "train.txt"),), "seq_len": 8})
    config.data.cache_dir = str(tmp_path / "cache")
    one, same, other = (calibration.draw(config, "train", 20, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["inputs"], same["inputs"])
    assert len({row.tobytes() for row in one["inputs"]}) == 20
    assert (one["inputs"] != other["inputs"]).any()


@pytest.mark.parametrize("name", registry.names("attention"))
@pytest.mark.exhaustive
def test_every_method_of_attention(name, samples):
    config = default_config.get_config()
    config.model.num_layers = 2
    config.attention = registry.method_config("attention", name)
    definition = ModelDef(config)
    layers = definition.to_layers(jax.jit(lambda: definition.init(jax.random.key(0))[0])())
    layers |= definition.to_layers(jax.jit(lambda: definition.init(jax.random.key(0))[1])())
    tokens = np.random.default_rng(0).integers(0, 258, (2, config.data.seq_len))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    text = {"inputs": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    targets = [n for n in layers if n.startswith("layers/1") and n.endswith("/kernel")]
    found = pruned(definition, layers, targets, WANDA, text)
    assert all(mask.mean() == 0.5 for _, mask in found.values())
