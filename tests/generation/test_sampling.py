"""Sampling follows the model, reads prompts of different lengths together, and compiles little."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh, presets
from sparseformer_jax.checks import ConfigError, NonFiniteError
from sparseformer_jax.generation import sampling
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.training.state import ModelDef, TrainState

WORKDIR = Path("workdir")  # never looked at: its state is replaced
GREEDY = Choice(0.0)


@pytest.fixture(scope="module")
def config():
    config = presets.baseline("tiny")
    config.model.vocab_size = 300
    config.data.seq_len = 24
    return config


@pytest.fixture(scope="module")
def model(config):
    """The model and its state, far enough from uniform that draws differ."""
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        params, variables = model_def.init(jax.random.key(0))
        params = {name: 3 * value for name, value in params.items()}
        return model_def, TrainState(0, params, variables)


@pytest.fixture(scope="module")
def logits(model):
    """The model's logits of the next token after some, in one window."""
    model_def, state = model
    plain = model_def.model(jax.tree.map(jnp.asarray, jax.device_get(state.params)), {}, 0)
    forward = jax.jit(lambda window: plain(window).logits)

    def after(tokens):
        window = np.zeros((1, 24), np.int32)
        window[0, : len(tokens)] = tokens
        return forward(window)[0, len(tokens) - 1, :258]

    return after


@pytest.fixture(autouse=True)
def _checkpoint(monkeypatch, model):
    """The state, in place of that of a workdir."""
    monkeypatch.setattr(sampling, "restore_state", lambda *_: model[1])


@pytest.fixture(scope="module")
def greedy(config, model):
    return sampler(config, model, GREEDY)


@pytest.fixture(scope="module")
def drawer(config, model):
    return sampler(config, model, Choice(1.0))


def sampler(config, model, choice):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "restore_state", lambda *_: model[1])
        return sampling.Sampler(config, WORKDIR, choice=choice)


def test_the_likeliest_tokens_are_those_of_the_model_on_what_came_before(greedy, logits):
    """For prompts of different lengths, of which a sequence forgets its first half when full."""
    prompts = [[256, *b"spam and"], [256], [256, *b"a prompt that is as long"]]
    seen = [prompt[-24:] for prompt in prompts]
    for chosen in itertools.islice(greedy.tokens(prompts), 30):
        for tokens, token in zip(seen, chosen, strict=True):
            values = logits(tokens)
            # To rounding: the window sums in another order.
            assert values[token] > np.max(values) - 1e-4 * np.max(np.abs(values))
            tokens.append(token)
            if len(tokens) > 24:
                del tokens[:-12]


def test_a_sequence_does_not_depend_on_the_others(greedy):
    together = list(itertools.islice(greedy.tokens([[256, 65], [256, *b"longer"]]), 12))
    alone = list(itertools.islice(greedy.tokens([[256, 65]]), 12))
    assert [row[0] for row in together] == [row for (row,) in alone]


def test_two_compilations_however_long(drawer):
    compiled = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    drawn = drawer.tokens([[256, 65]])
    start = list(itertools.islice(drawn, 2))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        tokens = [*start, *itertools.islice(drawn, 16)]
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len({token for (token,) in tokens}) > 10


def test_draws_follow_the_seed(drawer, monkeypatch):
    def draw(seed):
        monkeypatch.setattr(drawer, "_key", jax.random.key(seed))
        return list(itertools.islice(drawer.tokens([[256, 65], [256, 65]]), 5))

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    assert [a for a, _ in first] != [b for _, b in first]


def test_pieces_add_up_and_end_with_the_document(config, greedy, monkeypatch):
    euro = list("€a".encode())
    monkeypatch.setattr(
        sampling.Sampler,
        "tokens",
        lambda _, prompts: ([t] * len(prompts) for t in [*euro, 257, 65]),
    )
    assert list(greedy.stream("b", 9)) == ["", "", "€", "a", "", ""]
    assert list(greedy.stream("b", 2)) == ["", "", "\ufffd"]
    assert greedy.continuations(["b", ""], 9) == ["€a", "€a"]
    assert sampling.generate(config, WORKDIR, ["b"], 3) == ["b€"]


def test_text_ends_before_what_stops_it(config, model, monkeypatch):
    """Rows one by one: at a string, or at any of the tokens that end a continuation."""
    config = config.copy_and_resolve_references()
    config.data.stop_tokens = ("<bos>",)
    sampler_ = sampler(config, model, GREEDY)
    rows = [b"one\n\ntwo", [*b"one", 256, *b"two."], b"one\ntwo\n"]
    chosen = list(zip(*(list(row)[:8] for row in rows), strict=True))
    taken = []

    def tokens(self, prompts):
        for step in chosen:
            taken.append(step)
            yield [step[number] for number in range(len(prompts))]

    monkeypatch.setattr(sampling.Sampler, "tokens", tokens)
    assert sampler_.continuations([""] * 3, 8, ["\n\n"]) == ["one", "one", "one\ntwo\n"]
    assert sampler_.continuations([""] * 2, 8, ["\n\n", "!"]) == ["one", "one"]
    assert len(taken) == 8 + 5, "nothing is chosen after the last has ended"
    assert list(sampler_.stream("", 8, ["\n\n"])) == ["o", "n", "e", "", "", ""]
    assert "".join(sampler_.stream("", 4, ["\n\n"])) == "one\n", "what was held back is text"


def test_a_stream_leaves_the_mesh_of_its_caller_alone(greedy):
    before = jax.sharding.get_mesh()
    next(greedy.stream("b", 3))
    assert jax.sharding.get_mesh() == before


def test_parameters_that_predict_nothing_end_it(greedy, model, monkeypatch):
    params = {name: value * jnp.nan for name, value in model[1].params.items()}
    monkeypatch.setattr(greedy._decoder, "_state", TrainState(model[1].step, params, {}))
    with pytest.raises(NonFiniteError, match="logits of token 0 are not finite"):
        next(greedy.stream("b", 3))


def test_mistakes_are_told_before_anything_is_drawn(config):
    with pytest.raises(ConfigError, match=r"--seed=1180591620717411303424: must be from 0"):
        sampling.Sampler(config, WORKDIR, choice=GREEDY, seed=2**70)
    encoder = config.copy_and_resolve_references()
    encoder.model.is_causal = False
    with pytest.raises(ConfigError, match="an encoder does not predict"):
        sampling.Sampler(encoder, WORKDIR, choice=GREEDY)
