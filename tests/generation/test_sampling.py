"""Sampling is exact, compiled once, and says in one line what it cannot take."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, presets, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.generation import sampling
from sparseformer_jax.training.state import ModelDef, TrainState

WORKDIR = Path("workdir")  # never looked at: its state is replaced


@pytest.fixture(scope="module")
def config():
    config = presets.baseline("tiny")
    config.attention = registry.method_config("attention", "s2", block_size=8, local_blocks=1)
    config.model.vocab_size = 300
    config.data.seq_len = 16
    return config


@pytest.fixture(scope="module")
def model(config):
    """The model and its state, far enough from uniform that draws differ."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params, variables = model_def.init(jax.random.key(0))
        params = {name: 3 * value for name, value in params.items()}
        return model_def, TrainState(0, params, variables)


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch, model):
    """The state, in place of that of a workdir."""
    monkeypatch.setattr(sampling, "restore_state", lambda *_: model[1])


def sampler(config, **changes) -> sampling.Sampler:
    options = {"step": None, "temperature": 1.0, "seed": 0, "vocab_size": 258} | changes
    return sampling.Sampler(config, WORKDIR, **options)


def test_the_likeliest_tokens_are_those_of_the_model_on_what_came_before(config, model):
    """Also where the text outgrows the window, whose last tokens count then."""
    start = [256, *b"spam and"]
    drawn = sampler(config, temperature=0.0).continuation(start)
    tokens = start + list(itertools.islice(drawn, 14))
    plain = model[0].model(jax.tree.map(jnp.asarray, jax.device_get(model[1].params)), {}, 0)
    forward = jax.jit(lambda window: plain(window).logits)
    for position in range(len(start), len(tokens)):
        seen = tokens[:position][-16:]
        window = np.zeros((1, 16), np.int32)
        window[0, : len(seen)] = seen
        logits = forward(window)[0, len(seen) - 1, :258]
        assert tokens[position] == int(jnp.argmax(logits))


def test_one_compilation_however_long(config):
    compiled = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    drawn = sampler(config).continuation([256, 65])
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        tokens = list(itertools.islice(drawn, 40))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1
    assert len(set(tokens)) > 10


def test_draws_follow_the_softmax(config, model):
    """At temperature 2: the first draw of many seeds, against the model's probabilities."""
    drawer = sampler(config, temperature=2.0)
    counts = np.zeros(258)
    for seed in range(800):
        drawer._key = jax.random.key(seed)
        counts[next(drawer.continuation([256]))] += 1
    plain = model[0].model(jax.tree.map(jnp.asarray, jax.device_get(model[1].params)), {}, 0)
    probabilities = jax.nn.softmax(plain(jnp.full((1, 16), 256)).logits[0, 0, :258] / 2)
    likely = np.argsort(probabilities)[-5:]
    np.testing.assert_allclose(counts[likely] / 800, probabilities[likely], atol=0.05)


def test_pieces_add_up_and_end_with_the_document(config, monkeypatch):
    euro = list("€a".encode())
    monkeypatch.setattr(sampling.Sampler, "continuation", lambda *_: iter([*euro, 257, 65]))
    assert list(sampling.stream(config, WORKDIR, "b")) == ["", "", "€", "a", ""]
    assert list(sampling.stream(config, WORKDIR, "b", num_tokens=2)) == ["", "", "\ufffd"]
    assert sampling.generate(config, WORKDIR, "b", num_tokens=3) == "b€"


def test_a_stream_leaves_the_mesh_of_its_caller_alone(config):
    before = jax.sharding.get_mesh()
    pieces = sampling.stream(config, WORKDIR, "b")
    next(pieces)
    assert jax.sharding.get_mesh() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "--temperature=nan: must be from 0.001 to 1000, or 0"),
        ({"temperature": float("inf")}, "--temperature=inf: must be"),
        ({"temperature": 1e-40}, "--temperature=1e-40: must be"),
        ({"seed": 2**70}, "--seed=1180591620717411303424: must be from 0 to below 2**32"),
        ({"prompt": "a\udcff"}, r"--prompt='a\udcff': not UTF-8 at character 1"),
    ],
)
def test_mistakes_are_told_before_anything_is_drawn(config, options, message):
    with pytest.raises(ConfigError) as caught:
        sampling.stream(config, WORKDIR, **{"prompt": "spam"} | options)
    assert str(caught.value).startswith(message)
