"""What pictures show against computations by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import data, mesh, presets, registry
from sparseformer_jax.evaluation import inspection, pictures
from sparseformer_jax.evaluation.perplexity import Evaluator
from sparseformer_jax.evaluation.sums import Losses
from sparseformer_jax.training.state import ModelDef, TrainState


def prepared(tmp_path, validation, **attention):
    """(config, definition, corpus, state) of a tiny model, trained on nothing."""
    (tmp_path / "train.txt").write_text("spam " * 40)
    (tmp_path / "validation.txt").write_text(validation)
    config = presets.baseline("tiny")
    config.data.files = (str(tmp_path),)
    config.data.seq_len = 32
    config.model.num_kv_heads = config.model.num_heads  # routed heads have keys of their own
    config.eval.batch_size = 4
    config.eval.num_batches = 0
    if attention:
        config.attention = registry.method_config("attention", **attention)
    with jax.set_mesh(mesh.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        model_def = ModelDef(config)
        corpus = data.load_corpus(config.data, "validation", data.make_tokenizer(config.data))
        state = TrainState(jnp.int32(0), *model_def.init(jax.random.key(0)))
    return config, model_def, corpus, state


def test_losses_are_those_of_positions_and_weigh_tokens(tmp_path):
    """The last window is not full: later positions have fewer tokens."""
    config, model_def, corpus, state = prepared(tmp_path, "the quick brown fox " * 9)
    with jax.set_mesh(mesh.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        evaluator = Evaluator(config, model_def, corpus)
        losses = evaluator.measure(state)
        whole = evaluator.numbers(losses)
        state = jax.device_get(state)
    model = model_def.model(*jax.tree.map(jnp.asarray, (state.params, state.variables)), 0)
    bits, tokens = np.zeros(32), np.zeros(32)
    for batch in data.eval_batches(corpus, seq_len=32, batch_size=4):
        inputs = (jnp.asarray(batch[name]) for name in ("inputs", "positions", "segment_ids"))
        log_p = np.asarray(jax.nn.log_softmax(model(*inputs).logits), np.float64)
        nll = -np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        bits += (batch["weights"] * nll / np.log(2)).sum(0)
        tokens += batch["weights"].sum(0)
    assert tokens.min() < tokens.max()
    np.testing.assert_array_equal(losses.tokens, tokens)
    np.testing.assert_allclose(losses.bits, bits / tokens, rtol=1e-5)
    mean = np.average(losses.bits, weights=losses.tokens)
    np.testing.assert_allclose(mean, whole["loss"] / np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(losses.diagnostics["density"], np.ones(config.model.num_layers))


def test_a_position_without_tokens_has_no_loss(tmp_path):
    config, model_def, corpus, state = prepared(tmp_path, "short")
    with jax.set_mesh(mesh.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        losses = Evaluator(config, model_def, corpus).measure(state)
    # A mark before and one after the five letters: six tokens are predicted.
    assert losses.tokens.tolist() == [1] * 6 + [0] * 26
    assert np.isfinite(losses.bits[:6]).all()
    assert np.isnan(losses.bits[6:]).all()


def test_padding_is_no_part_of_the_window(tmp_path):
    config, model_def, corpus, state = prepared(tmp_path, "short")
    with jax.set_mesh(mesh.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        window = inspection.first_window(config, model_def, corpus, state)
    assert (window.tokens, window.tile_size) == (["<bos>", *"short"], 1)
    for layer in window.kept:
        for head in layer["attended"]:
            np.testing.assert_array_equal(head, np.tril(np.ones((6, 6))))


def window_of(tmp_path, **attention):
    config, model_def, corpus, state = prepared(tmp_path, "the quick brown fox " * 9, **attention)
    with jax.set_mesh(mesh.make_mesh({"data": 2, "context": 2}, jax.devices()[:4])):
        window = inspection.first_window(config, model_def, corpus, state)
    assert (len(window.tokens), window.tile_size) == (32, 1)
    assert len(window.kept) == config.model.num_layers
    return config, window


def test_every_head_shows_its_own_pattern(tmp_path):
    options = {"block_size": 4, "local_blocks": 2, "vert_stride": 4, "head_sliding_step": 1}
    config, window = window_of(tmp_path, name="s2", **options, dense_every=2)
    position = np.arange(32)
    block = position // 4
    causal = position[:, None] >= position
    band = block[:, None] - block < 2
    heads = np.arange(config.model.num_heads)[:, None]
    stripes = ((block + heads + 0) % 4 == 0)[:, None]
    np.testing.assert_array_equal(
        window.kept[0]["attended"], (causal & (band | stripes)).astype(float)
    )
    for head in window.kept[1]["attended"]:
        np.testing.assert_array_equal(head, causal)


@pytest.mark.parametrize("variant", ["fixed", "axial_mixture", "log_sparse"])
@pytest.mark.representative("fixed")
def test_combiner_shows_what_is_direct_and_what_goes_through_summaries(tmp_path, variant):
    _, window = window_of(tmp_path, name="combiner", variant=variant, span_size=8)
    position = np.arange(32)
    query, key = position[:, None], position[None]
    direct = query == key
    if variant != "log_sparse":
        direct = query // 8 == key // 8
    if variant == "axial_mixture":
        direct |= query % 8 == key % 8
    direct &= query >= key
    for layer in window.kept:
        assert list(layer) == ["direct", "through summaries"]
        for head in layer["direct"]:
            np.testing.assert_array_equal(head, direct)
        for head in layer["through summaries"]:
            np.testing.assert_array_equal(head, (query >= key) & ~direct)
    for kinds, weights in zip(window.shares, window.weights, strict=True):
        np.testing.assert_allclose(sum(kinds.values()), 1, rtol=1e-5)
        for kind, share in kinds.items():
            np.testing.assert_allclose(share, weights[kind].sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", registry.names("attention"))
def test_every_method_shows_itself(tmp_path, name):
    _, window = window_of(tmp_path, name=name)
    for layer in window.kept:
        kept = sum(layer.values())
        assert kept.max() == 1
        assert not np.triu(kept, 1).any()
        assert (kept.sum(-1) >= 1).all(), "every token looks somewhere"


@pytest.mark.parametrize("selection", ["causal", "paper"])
@pytest.mark.representative("causal")
def test_routing_tells_which_clusters_hold_which_tokens(tmp_path, selection):
    options = {"selection": selection, "num_clusters": 4, "window_size": 5}
    config, window = window_of(tmp_path, name="routing", **options)
    ((method, layers),) = window.own.items()
    assert method is registry.method("attention", "routing").Method
    assert list(layers) == list(range(config.model.num_layers))
    drawn = pictures.draw(Losses(*np.ones((2, 4))), window, {}, "run")
    assert {"routing_clusters", "routing_cluster_sizes"} <= set(drawn)
    for layer in layers.values():
        assert layer.options.window_size == 5
        assert layer.arrays["head"].tolist() == [1, 3]
        members, sizes = layer.arrays["members"], layer.arrays["sizes"]
        assert members.shape == (2, 4, 32)
        assert set(sizes.sum(-1)) == {32}
        if selection == "paper":
            assert set(members.sum(-1).flat) == {5}
            continue
        np.testing.assert_array_equal(members.sum(-1), sizes)
        before = np.cumsum(members, axis=-1) - 1
        np.testing.assert_array_equal((members * before).sum(1), layer.arrays["mates"])


def test_tiles_are_fractions_of_their_pairs_and_the_last_is_smaller():
    weights = np.tril(np.full((1, 5, 5), 0.1))
    expected = [[3 / 4, 0, 0], [1, 3 / 4, 0], [1, 1, 1]]
    np.testing.assert_array_equal(inspection.tiles(weights, 2)[0], np.float32(expected))
