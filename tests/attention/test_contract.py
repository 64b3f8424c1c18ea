"""What every attention method keeps to, new ones too: this walks their folder.

A method is tested at the "tiny" size of its config. Its own test module names in
DENSE_OPTIONS the options with which it does no more than dense attention does. It may also say

- VISITS_SUMMARIES: keys have weights through summaries, not each through a pair;
- DENSITY_VARIES: keys are chosen by their contents, so `density` is an estimate, and the
  diagnostic of that name is measured;
- DOCUMENT_TOLERANCE: how far other documents may move an output, relative to the largest, for
  a method that moves tokens about, so that sums have another order;
- BFLOAT16_ERROR: of the logits, as choices between close scores fall differently.
"""

import dataclasses
import functools
import gc
import importlib
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax import mesh, registry
from sparseformer_jax.attention import dense
from sparseformer_jax.attention.inputs import Shard
from sparseformer_jax.build import make_model
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.loss import cross_entropy
from sparseformer_jax.training.state import ModelDef
from tests.model.harness import (
    assert_close,
    layers,
    normal,
    packed,
    put,
    random_parameter,
    randomized,
    weights_of,
)

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
ROWS = 8
HUGE = 1e15
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"context": 2, "fsdp": 4},
    {"tensor": 2, "context": 2, "fsdp": 2},
]


def forward(model_def, variables, params, batch, rng=None):
    model = model_def.model(params, variables, 0)
    return model(batch["inputs"], batch["positions"], batch["segment_ids"], rng=rng)


def total_loss(model_def, params, variables, batch):
    """The training loss, and the statistics that the method's state learns from."""
    model = model_def.model(params, variables, 0)
    rng = jax.random.key(0)  # a method's noise is the same wherever it is drawn
    inputs = (batch[name] for name in ("inputs", "positions", "segment_ids", "weights"))
    output = model.features(*inputs, rng=rng)
    nll, _ = cross_entropy(model, output.hidden, batch["targets"], batch["weights"])
    loss = nll + sum(output.losses.values())
    return loss / jnp.sum(batch["weights"]), output.statistics


@dataclasses.dataclass
class Subject:
    """A method's tiny model, its parameters and a batch of packed documents."""

    config: Any
    batch: dict[str, Any]

    @functools.cached_property
    def model_def(self):
        return ModelDef(self.config)

    @functools.cached_property
    def params(self):
        params = self.model_def.params
        return {name: random_parameter(name, v.shape) for name, v in params.items()}

    @functools.cached_property
    def variables(self):
        """Those of the method beside its parameters, as they are before training."""
        if not self.model_def.variables:
            return {}
        with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
            _, variables = self.model_def.init(jax.random.key(0))
        return jax.tree.map(jnp.asarray, jax.device_get(variables))

    @functools.cached_property
    def forward(self):
        return jax.jit(functools.partial(forward, self.model_def, self.variables))

    @functools.cached_property
    def gradients(self):
        """Loss and statistics, and the gradients."""
        return self.gradients_of(self.config, self.params, self.variables, self.batch)

    @staticmethod
    def gradients_of(config, params, variables, batch):
        loss = functools.partial(total_loss, ModelDef(config))
        gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return jax.device_get(gradients(params, variables, batch))

    def changed(self, **model):
        config = self.config.copy_and_resolve_references()
        config.model.update(model)
        return config

    @functools.cached_property
    def attention_inputs(self):
        shape = (*self.batch["inputs"].shape, self.config.model.embed_dim)
        x = jnp.asarray(normal(0, *shape))
        return x, self.batch["positions"], self.batch["segment_ids"]

    @staticmethod
    @jax.jit
    def run(attention, x, positions, segment_ids):
        return attention(x, positions, segment_ids)

    def attention(self, options=None):
        """One attention module of the method, by default with the config's options."""
        section = self.config.attention
        if options is not None:
            section = registry.method_config("attention", section.name, **options)
        method = registry.method("attention", section.name).Method
        options = registry.options("attention", section)
        model = ModelConfig(**self.config.model)
        return randomized(lambda: method(model, options, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module", params=registry.names("attention"))
def subject(request):
    config = runpy.run_path(str(CONFIGS / f"{request.param}.py"))["get_config"]("tiny")
    rng = np.random.default_rng(0)
    shape = (ROWS, config.data.seq_len)
    segment_ids, positions = packed(rng, *shape)
    batch = {
        "inputs": rng.integers(0, config.model.vocab_size - 1, shape, np.int32),
        "targets": rng.integers(0, config.model.vocab_size, shape, np.int32),
        "weights": rng.integers(0, 2, shape).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": positions,
    }
    yield Subject(config, jax.tree.map(jnp.asarray, batch))
    Subject.run.clear_cache()
    gc.collect()  # or the programs of all methods fill gigabytes


@pytest.fixture(scope="module")
def own(subject):
    """The test module of the method."""
    return importlib.import_module(f"{__package__}.test_{subject.config.attention.name}")


@pytest.fixture(scope="module")
def dense_options(own):
    return own.DENSE_OPTIONS


def test_outputs_have_their_shapes(subject):
    output, model = subject.forward(subject.params, subject.batch), subject.config.model
    assert output.logits.shape == (*subject.batch["inputs"].shape, model.vocab_size)
    assert output.logits.dtype == jnp.float32
    assert all(value.shape == () for value in output.losses.values())
    assert all(len(value) <= model.num_layers for value in output.diagnostics.values())


@pytest.mark.representative("s2", "masformer", "dense")  # pairs are counted without jit, too
def test_attention_is_the_same_compiled_or_not(subject):
    attention, arguments = subject.attention(), subject.attention_inputs
    eager = attention(*arguments)
    assert eager.output.shape == arguments[0].shape
    assert_close(subject.run(attention, *arguments), eager, 1e-5)


def test_every_parameter_has_a_finite_gradient(subject):
    _, gradients = subject.gradients
    assert set(subject.model_def.trainable()) <= set(gradients)
    for name in subject.model_def.trainable():
        assert np.isfinite(gradients[name]).all(), name
        assert np.abs(gradients[name]).max() > 1e-8, name


def test_model_does_not_see_the_future(subject):
    table = subject.params["embedding/table"]
    params = {**subject.params, "embedding/table": table.at[-1].multiply(HUGE)}
    inputs = subject.batch["inputs"]
    seq_len = inputs.shape[1]
    cut = np.array([1, 2, 15, 16, 17, seq_len // 2 + 1, seq_len - 16, seq_len - 1])[:, None]
    future = np.arange(seq_len) >= cut
    one_document = {"positions": None, "segment_ids": None}

    def logits(inputs):
        return subject.forward(params, {"inputs": inputs} | one_document).logits

    before, after = (
        logits(inputs),
        logits(jnp.where(future, table.shape[0] - 1, inputs)),
    )
    assert_only_moves_where(future, before, after)


def test_model_does_not_see_other_documents(subject, own):
    table = subject.params["embedding/table"]
    params = {**subject.params, "embedding/table": table.at[-1].multiply(HUGE)}
    other = np.asarray(subject.batch["segment_ids"]) == np.arange(ROWS)[:, None] % 3
    inputs = jnp.where(other, table.shape[0] - 1, subject.batch["inputs"])
    before = subject.forward(params, subject.batch).logits
    after = subject.forward(params, subject.batch | {"inputs": inputs}).logits
    assert_only_moves_where(other, before, after, getattr(own, "DOCUMENT_TOLERANCE", 0))


@pytest.mark.parametrize("segmented", [False, True])
def test_attention_sees_neither_future_nor_other_documents(subject, own, segmented):
    x, positions, ids = subject.attention_inputs
    hidden = ids == np.arange(ROWS)[:, None] % 3
    if not segmented:
        positions, ids = jnp.broadcast_to(jnp.arange(x.shape[1]), ids.shape), 0 * ids
        hidden = positions >= np.linspace(1, x.shape[1] - 1, ROWS).astype(int)[:, None]
    changed = jnp.where(hidden[..., None], HUGE * normal(1, *x.shape), x)
    attention = subject.attention()
    before, after = (subject.run(attention, y, positions, ids).output for y in (x, changed))
    tolerance = getattr(own, "DOCUMENT_TOLERANCE", 0) if segmented else 0
    assert_only_moves_where(np.asarray(hidden), before, after, tolerance)


def assert_only_moves_where(changed, before, after, tolerance=0):
    """By not a bit elsewhere, or by no more than a tolerance relative to the largest entry."""
    before, after = (np.asarray(x, np.float64) for x in (before, after))
    limit = tolerance * np.abs(before[~changed]).max()
    assert (np.abs(before - after)[~changed] <= limit).all()
    assert (before != after).any(-1)[changed].mean() > 0.5


def test_a_first_document_is_not_affected_by_being_packed(subject):
    first = np.asarray(subject.batch["segment_ids"]) == 0
    alone = subject.batch | {"positions": None, "segment_ids": None}
    expected = subject.forward(subject.params, alone).logits
    actual = subject.forward(subject.params, subject.batch).logits
    assert_close(actual[first], expected[first], 1e-5)


def test_sparsity_off_is_dense_attention(subject, dense_options):
    assert dense_options
    for options in dense_options:
        attention = subject.attention(options)
        full = dense.Method(attention.config, dense.Options(), rngs=nnx.Rngs(1))
        for shared in ("query", "key", "value", "out", "query_norm", "key_norm"):
            setattr(full, shared, getattr(attention, shared))
        actual = subject.run(attention, *subject.attention_inputs).output
        expected = subject.run(full, *subject.attention_inputs).output
        assert_close(actual, expected, 1e-5)
        assert attention.density(actual.shape[1]) == 1.0


def test_sparsity_off_documents_are_as_if_alone(subject, dense_options):
    attention = subject.attention(dense_options[0])
    x, positions, ids = subject.attention_inputs
    together = subject.run(attention, x, positions, ids).output
    for document in range(3):
        row = np.asarray(ids[0]) == document
        length = row.sum()
        # At the start of a row, where nothing that follows is seen.
        alone = jnp.zeros_like(x).at[0, :length].set(x[0, row])
        one = jnp.broadcast_to(jnp.arange(x.shape[1]), ids.shape), 0 * ids
        output = subject.run(attention, alone, *one).output
        assert_close(together[0, row], output[0, :length], 1e-5)


@pytest.mark.representative("s2")
def test_density_is_the_fraction_of_pairs_attended(subject, own):
    attention, seq_len = subject.attention(), subject.config.data.seq_len
    config = attention.config
    x, positions = jnp.asarray(normal(0, 1, seq_len, config.embed_dim)), jnp.arange(seq_len)[None]
    inputs = attention._inputs(x, positions, None, None, 0)
    weights = np.asarray(weights_of(attention, inputs))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    pairs = config.num_heads * seq_len * (seq_len + 1) / 2
    found = (weights > 0).sum() / pairs
    if getattr(own, "VISITS_SUMMARIES", False):
        assert 0 < attention.density(seq_len) < found == 1
        return
    attended = attention.attend(inputs, Shard(num_heads=config.num_heads))
    assert attended.diagnostics.get("density", found) == pytest.approx(found)
    if not getattr(own, "DENSITY_VARIES", False):
        assert attention.density(seq_len) == pytest.approx(found)


def test_dropout_is_a_function_of_the_key(subject):
    model_def = ModelDef(subject.changed(dropout=0.3))
    run = jax.jit(functools.partial(forward, model_def, subject.variables))
    first, again, other = (
        run(subject.params, subject.batch, jax.random.key(seed)).logits for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any(-1).all()


@pytest.mark.parametrize("remat", ["full", "dots_saveable"])
@pytest.mark.representative("combiner-full")
def test_recomputing_changes_nothing(subject, remat):
    config = subject.changed(remat=remat)
    actual = subject.gradients_of(config, subject.params, subject.variables, subject.batch)
    assert_close(actual, subject.gradients, 1e-5)


def test_scan_is_a_loop_over_layers(subject):
    @jax.jit
    def looped(params, batch):
        model = subject.model_def.model(params, subject.variables, 0)
        x, reports = model.embedding(batch["inputs"]), []
        for block in layers(model):
            x, report = block(x, batch["positions"], batch["segment_ids"], None)
            reports.append(report)
        return model.logits(model.final_norm(x), model.output_kernel()), reports

    output = subject.forward(subject.params, subject.batch)
    logits, reports = looped(subject.params, subject.batch)
    assert len(reports) == subject.config.model.num_layers
    assert_close(output.logits, logits, 1e-5)
    for name, total in output.losses.items():
        assert_close(total, sum(report.losses.get(name, 0) for report in reports), 1e-5)
    for name, values in output.diagnostics.items():
        found = [report.diagnostics for report in reports]
        expected = [numbers[name] for numbers in found if name in numbers]
        assert_close(values, jnp.stack(expected), 1e-5)


def test_bfloat16_is_near_float32(subject, own):
    model_def = ModelDef(subject.changed(compute_dtype="bfloat16"))
    run = jax.jit(functools.partial(forward, model_def, subject.variables))
    actual = run(subject.params, subject.batch).logits
    expected = subject.forward(subject.params, subject.batch).logits
    assert actual.dtype == jnp.float32
    error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < getattr(own, "BFLOAT16_ERROR", 0.03)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.representative("*'tensor': 2, 'context': 2*")
def test_loss_and_gradients_do_not_depend_on_the_mesh(subject, sizes):
    with jax.set_mesh(mesh.make_mesh(sizes)):
        places = subject.model_def.abstract(jax.sharding.get_mesh())
        params, variables = jax.tree.map(
            lambda x, place: jax.device_put(x, place.sharding),
            (subject.params, subject.variables),
            places,
        )
        batch = {name: put(x, "batch", "seq") for name, x in subject.batch.items()}
        actual = subject.gradients_of(subject.config, params, variables, batch)
    assert_close(actual, subject.gradients, 1e-5)


def test_parameters_survive_merging(subject):
    model = subject.model_def.model(subject.params, subject.variables, 0)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    found = {"/".join(map(str, path)): leaf[...] for path, leaf in flat.items()}
    expected = subject.params | subject.variables
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    made = nnx.eval_shape(lambda: make_model(subject.config, rngs=nnx.Rngs(1)))
    assert nnx.graphdef(model) == nnx.graphdef(made)
