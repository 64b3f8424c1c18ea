"""Perplexity against a computation by hand."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import data, mesh, presets, registry
from sparseformer_jax.evaluation.perplexity import Evaluator, at_other_densities
from sparseformer_jax.training.state import ModelDef, TrainState
from tests.model.harness import PENALISED


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("spam " * 40)
    (text / "validation.txt").write_text("the quick brown fox, żółć! " * 9)
    config = presets.baseline("tiny")
    config.data.files = (str(text),)
    config.data.seq_len = 32
    config.eval.batch_size = 3
    config.eval.num_batches = 0
    return config


def test_every_token_counts_once(config):
    """The whole split, whose last batch and window are not full."""
    tokenizer = data.make_tokenizer(config.data)
    corpus = data.load_corpus(config.data, "validation", tokenizer)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = TrainState(0, *model_def.init(jax.random.key(0)))
        results = Evaluator(config, model_def, corpus)(state)
    params = jax.tree.map(jnp.asarray, jax.device_get(state.params))
    model = model_def.model(params, state.variables, 0)
    text = "the quick brown fox, żółć! " * 9
    tokens = np.array([256, *text.encode(), 257])
    nll = 0.0
    for start in range(0, len(tokens) - 1, 32):
        window = tokens[start : start + 33]
        logits = np.asarray(model(jnp.asarray(window[None, :-1])).logits[0], np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        nll += (log_z - logits[np.arange(len(window) - 1), window[1:]]).sum()
    assert results["tokens"] == len(tokens) - 1
    np.testing.assert_allclose(results["loss"], nll / (len(tokens) - 1), rtol=1e-5)
    np.testing.assert_allclose(results["perplexity"], np.exp(results["loss"]))
    bits = nll / np.log(2) / len(text.encode())
    np.testing.assert_allclose(results["bits_per_byte"], bits, rtol=1e-5)
    assert results["density"] == 1.0


def test_parts_of_a_split(config):
    corpus = data.load_corpus(config.data, "validation", data.make_tokenizer(config.data))
    config.eval.num_batches = 1
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = TrainState(0, *model_def.init(jax.random.key(0)))
        results = Evaluator(config, model_def, corpus)(state)
    assert results["tokens"] == 3 * 32


def test_diagnostics_are_means_over_tokens(config, add_attention):
    """The last batch has fewer of them than the others."""
    more = '{"overflow": jnp.mean(jnp.square(output)), "density"'
    add_attention("penalised", PENALISED.replace('{"density"', more))
    config.attention = registry.method_config("attention", "penalised")
    corpus = data.load_corpus(config.data, "validation", data.make_tokenizer(config.data))
    batches = data.eval_batches(
        corpus, seq_len=32, batch_size=3, num_batches=0, process_index=0, process_count=1
    )
    tokens, found = [], {"density": [], "overflow": []}
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params, variables = model_def.init(jax.random.key(0))
        state = TrainState(jnp.int32(0), params, variables)
        results = Evaluator(config, model_def, corpus)(state)
    model = model_def.model(jax.tree.map(jnp.asarray, jax.device_get(params)), {}, 0)
    for batch in batches:
        inputs = (jnp.asarray(batch[name]) for name in ("inputs", "positions", "segment_ids"))
        diagnostics = model(*inputs).diagnostics
        for name, values in found.items():
            values.append(float(diagnostics[name].mean()))
        tokens.append(batch["weights"].sum())
    assert tokens[-1] < tokens[0]
    for name, values in found.items():
        expected = np.average(values, weights=tokens)
        assert abs(np.mean(values) / expected - 1) > 1e-4
        np.testing.assert_allclose(results[name], expected, rtol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("gates", "name", "amounts"),
    [("prefill", "density", [0.1, 0.2, 0.3, 0.5]), ("decode", "token_budget", [4, 8, 16])],
)
def test_other_densities_are_those_of_their_options(config, gates, name, amounts):
    """The last of them is the dense model, and each attends to no less than the one before."""
    config.attention = registry.method_config(
        "attention", "seer", gates=gates, block_size=4, threshold=0.3, capacity=3
    )
    corpus = data.load_corpus(config.data, "validation", data.make_tokenizer(config.data))
    dense = copy.deepcopy(config)
    dense.attention = registry.method_config("attention", "dense")
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        params, variables = ModelDef(config).init(jax.random.key(0))
        state = TrainState(jnp.int32(0), params, variables)
        found = at_other_densities(config, corpus, state)
        assert at_other_densities(dense, corpus, state) == []
        config.attention.threshold = config.attention.capacity = None
        for amount, point in zip([*amounts, None], found, strict=True):
            config.attention[name] = amount
            assert point == Evaluator(config, ModelDef(config), corpus)(state)
    densities = [point["density"] for point in found]
    assert densities[-1] == 1
    assert np.all(np.diff(densities) >= 0)  # two may keep as many blocks
    assert densities[0] < densities[-2]
