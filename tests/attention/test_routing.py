"""Routing against softmax over masks written out naively."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from sparseformer_jax import default_config, registry
from sparseformer_jax.attention import routing
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig
from tests.attention.comparison import assert_same_on_mesh, make_attention
from tests.model import reference
from tests.model.harness import assert_close, normal, packed

DENSE_OPTIONS = [{"num_routed_heads": 0, "block_size": size} for size in (64, 500)]
DENSITY_VARIES = True
# Sorted by cluster, a document's tokens lie behind those of the documents before: their sums
# round differently, and in the next layer once more.
DOCUMENT_TOLERANCE = 1e-5
BFLOAT16_ERROR = 0.1  # a few tokens change their cluster
SMALL = {"num_clusters": 3, "window_size": 5, "block_size": 4, "local_blocks": 2}


def make(options=None, **model):
    return make_attention("routing", SMALL | (options or {}), **{"num_kv_heads": 4} | model)


def normalised(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def attention_of(scores, visible, value, last_resort, values_by_pair=0.0):
    """Softmax over the visible pairs [.., T, S]; a pair of last resort only without others."""
    others = visible & ~last_resort
    visible = jnp.where(others.any(-1, keepdims=True), others, visible)
    scores = jnp.where(visible, scores, -1e9)
    weights = jnp.where(visible, jnp.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= jnp.where(visible.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
    by_pair = (weights[..., None] * values_by_pair).sum(-2)
    return jnp.einsum("...ts,...sh->...th", weights, value) + by_pair


def by_difference(table, difference):
    most = len(table) // 2
    return table[np.clip(difference, -most, most) + most]


def last_members(x, value, cluster, same_segment, options, scale, tables):
    """One head of one row."""
    same = cluster[:, None] == cluster
    rank = np.array([(cluster[:i] == cluster[i]).sum() for i in range(len(cluster))])
    i, j = np.ogrid[: len(cluster), : len(cluster)]
    visible = same & (j <= i) & (rank[:, None] - rank < options.window_size) & same_segment
    itself = np.eye(len(cluster), dtype=bool) & options.masks_self
    scores, values = x @ x.T, 0.0
    if tables is not None:
        difference = rank - rank[:, None]
        scores += (x[:, None] * by_difference(tables[0], difference)).sum(-1)
        values = by_difference(tables[1], difference)
    return attention_of(scale * scores, visible, value, itself, values)


def balanced(query, key, value, taken, same_segment, options, is_causal, scale, tables):
    """One head of one row; `taken` are the positions of each cluster's queries and keys."""
    size = min(options.window_size, len(query))
    total, times = jnp.zeros_like(value), np.zeros(len(query))
    for of_query, of_key in zip(*taken, strict=True):
        visible = same_segment[np.ix_(of_query, of_key)]
        if is_causal:
            visible = visible & (of_key <= of_query[:, None])
        q, k, values = query[of_query], key[of_key], 0.0
        scores, places = q @ k.T, np.arange(size)
        if tables is not None:
            difference = places - places[:, None]
            scores += (q[:, None] * by_difference(tables[0], difference)).sum(-1)
            values = by_difference(tables[1], difference)
        itself = (of_key == of_query[:, None]) & options.masks_self
        read = attention_of(scale * scores, visible, value[of_key], itself, values)
        total, times[of_query] = total.at[of_query].add(read), times[of_query] + 1
    return total / (times[:, None] + 0.01)


def local(query, key, value, same_segment, options, config, tables):
    block = np.arange(len(query)) // options.block_size
    distance = block[:, None] - block
    position = np.arange(len(query))
    visible = (np.abs(distance) < options.local_blocks) & same_segment
    if config.is_causal:
        visible &= position[:, None] >= position
    scores, values = query @ key.T, 0.0
    if tables is not None:
        difference = position - position[:, None]
        scores += (query[:, None] * by_difference(tables[0], difference)).sum(-1)
        values = by_difference(tables[1], difference)
    nothing = np.zeros_like(visible)
    return attention_of(config.scale * scores, visible, value, nothing, values)


def choices(attention, parameters, centroids, x):
    """Scores [R, C, T] of each row's queries and of its keys."""
    options, num_heads = attention.options, attention.config.num_heads
    routed = options.routed(num_heads)
    heads = [h for h in range(num_heads) if (h + 1) * routed // num_heads > h * routed // num_heads]

    def scores(name):
        kernel = parameters[name]["kernel"][:, heads]
        vectors = normalised(jnp.einsum("btd,dnh->bnth", x, kernel))
        return np.asarray(jnp.einsum("bnth,nch->bnct", vectors, centroids))

    key = scores("key")
    return (key if options.share_qk else scores("query")), key


def expected_output(attention, parameters, centroids, chosen, x, positions, segment_ids):
    """What the module should give, head by head."""
    config, options = attention.config, attention.options
    routed = options.routed(config.num_heads)
    scale = config.scale if options.logit_scale is None else options.logit_scale

    def project(name):
        return jnp.einsum("btd,dnh->btnh", x, parameters[name]["kernel"])

    def tables(name):
        table = parameters.get(name)
        return None if table is None else (table["key"], table["value"])

    key, value = project("key"), project("value")
    query = project("query") if "query" in parameters else key  # there are no local heads
    turned = config.position == "rope"
    far_query, far_key = (
        reference.rotate(y, positions, config.rope_theta) if turned else y for y in (query, key)
    )
    same = reference.same_segment(segment_ids)[:, 0]
    outputs, loss = [], 0.0
    for head in range(config.num_heads):
        is_routed = (head + 1) * routed // config.num_heads > head * routed // config.num_heads
        number = head * routed // config.num_heads
        own = head - number if options.share_qk and routed else head
        rows = []
        for row in range(len(x)):
            if not is_routed:
                arrays = far_query[row, :, own], far_key[row, :, head], value[row, :, head]
                rows.append(local(*arrays, same[row], options, config, tables("local_relative")))
                continue
            k = normalised(key[row, :, head])
            q = k if options.share_qk else normalised(query[row, :, head])
            shared, table = (same[row], options), tables("routed_relative")
            scores = [kind[row, number] for kind in chosen]  # of queries, of keys
            if options.selection == "causal":
                arrays = k, value[row, :, head], scores[1].argmax(0)
                rows.append(last_members(*arrays, *shared, scale, table))
            else:
                size = min(options.window_size, len(k))
                taken = [np.sort(np.argsort(-kind, axis=-1)[:, :size]) for kind in scores]
                arrays = q, k, value[row, :, head], taken
                rows.append(balanced(*arrays, *shared, config.is_causal, scale, table))
            for y, kind in zip((q, k), scores, strict=True):
                nearest = centroids[number][kind.argmax(0)]
                loss += jnp.mean((y - nearest) ** 2) / len(x) / routed
        outputs.append(jnp.stack(rows))
    mixed = jnp.stack(outputs, 2) @ parameters["out"]["shared"]
    output = jnp.einsum("btnh,nhd->btd", mixed, parameters["out"]["kernel"])
    return output, options.commitment * loss


def assert_is_the_naive(attention, num_tokens, seed=0):
    """Output, loss and all gradients are those of the naive version, in float64."""
    segment_ids, positions = packed(np.random.default_rng(seed), 2, num_tokens)
    x = normal(1, 2, num_tokens, attention.config.embed_dim)
    cotangent = normal(2, *x.shape)
    graphdef, parameters, variables = nnx.split(attention, nnx.Param, ...)

    def total(output, loss):
        return jnp.vdot(cotangent, output) + 1e4 * loss

    def actual(parameters, x):
        module = nnx.merge(graphdef, parameters, variables)
        attended = module(x, jnp.asarray(positions), jnp.asarray(segment_ids))
        losses = sum(attended.losses.values()) / (2 * num_tokens)
        return total(attended.output, losses), (attended.output, losses)

    def expected(parameters, x):
        arguments = parameters, centroids, chosen, x, positions, segment_ids
        output, loss = expected_output(attention, *arguments)
        return total(output, loss), (output, loss)

    gradients, results = jax.jit(jax.grad(actual, (0, 1), has_aux=True))(parameters, x)

    def double(tree):
        return jax.tree.map(lambda y: np.asarray(y, np.float64), tree)

    with jax.enable_x64(True):
        exact = double((nnx.to_pure_dict(parameters), x))
        centroids = double(variables["centroids"][...])
        chosen = choices(attention, exact[0], centroids, exact[1])
        truth = jax.jit(jax.grad(expected, (0, 1), has_aux=True))(*exact)
    assert_close((nnx.to_pure_dict(gradients[0]), gradients[1]), truth[0], 2e-5)
    assert_close(results, truth[1], 1e-5)


VARIANTS = [
    {},
    {"num_routed_heads": 1, "window_size": 1},
    {"num_routed_heads": 4, "masks_self": False, "logit_scale": 1.0},
    {"num_routed_heads": 3, "window_size": 20, "num_clusters": 2},
    {"routed_relative": 3, "local_relative": 2, "masks_self": False},
    {"routed_relative": 40, "window_size": 11, "local_blocks": 3, "local_relative": 40},
    {"selection": "paper"},
    {"selection": "paper", "share_qk": False, "routed_relative": 2},
    {"selection": "paper", "masks_self": False, "logit_scale": 1.0, "window_size": 99},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.representative("{}", "*'share_qk'*")
def test_is_the_naive_version(options):
    assert_is_the_naive(make(options), 37)


@pytest.mark.parametrize("options", [{}, {"routed_relative": 4, "local_relative": 3}], ids=str)
@pytest.mark.representative("{}")
def test_an_encoder_is_the_naive_version(options):
    options = {"selection": "paper", "share_qk": False, **options}
    assert_is_the_naive(make(options, is_causal=False, position="none"), 26)


@pytest.mark.parametrize("masks_self", [True, False])
@pytest.mark.parametrize("num_tokens", [24, 60])
def test_density_of_even_clusters(masks_self, num_tokens):
    options = {"masks_self": masks_self, "window_size": 12, "block_size": 60}
    i = np.arange(num_tokens)
    distance = i[:, None] - i
    visible = (distance % 3 == 0) & (distance >= 0) & (distance < 3 * 12)
    visible &= (distance > 0) | (i < 3) | (not masks_self)
    full = np.tri(num_tokens).sum()
    found = make(options).density(num_tokens)  # local heads see all
    assert found == pytest.approx((visible.sum() + full) / 2 / full)
    in_clusters = 3 * (np.tri(12).sum() - 11 * masks_self)
    found = make({**options, "selection": "paper"}).density(num_tokens)
    assert found == pytest.approx((in_clusters + full) / 2 / full)


@pytest.mark.parametrize("options", [{}, {"local_relative": 3}, {"selection": "paper"}], ids=str)
@pytest.mark.parametrize(("num_queries", "offset"), [(1, 28), (1, 0), (7, 9), (14, 14)])
@pytest.mark.representative("7-9-*paper*")
def test_queries_at_an_offset(options, num_queries, offset):
    """As a device of a context shard, or a step of decoding, has them."""
    attention, num_tokens = make(options), 29
    segment_ids, positions = packed(np.random.default_rng(3), 2, num_tokens)
    x = normal(4, 2, num_tokens, attention.config.embed_dim)
    arguments = jnp.asarray(x), jnp.asarray(positions), jnp.asarray(segment_ids)
    inputs = attention._inputs(*arguments, None, 0)
    part = slice(offset, offset + num_queries)
    pairs = {
        name: (getattr(inputs, name)[0][:, part], getattr(inputs, name)[1])
        for name in ("positions", "segment_ids", "weights")
    }
    own = {name: getattr(inputs, name)[:, part] for name in ("query", "unrotated_query")}
    local = dataclasses.replace(inputs, **own, **pairs)
    whole = attention.attend(inputs, Shard(num_heads=4))
    attended = jax.jit(attention.attend)(local, Shard(query_offset=offset, num_heads=4))
    assert_close(attended.output, whole.output[:, part], 1e-5)
    loss, of_part = whole.losses["commitment"], attended.losses["commitment"]
    assert_close(of_part, loss[:, part], 1e-5)


@pytest.mark.parametrize("selection", ["causal", "paper"])
@pytest.mark.representative("causal")
def test_shares_of_clusters_are_those_that_pictures_show(selection):
    attention, num_tokens = make({"selection": selection}), 29
    segment_ids, positions = map(jnp.asarray, packed(np.random.default_rng(3), 2, num_tokens))
    x = jnp.asarray(normal(4, 2, num_tokens, attention.config.embed_dim))
    logged = jax.jit(lambda *arguments: attention(*arguments).diagnostics)(
        x, positions, segment_ids
    )
    told = attention.inspect(x, positions, segment_ids)
    assert told["head"].tolist() == [[1, 3]] * 2
    shares = np.asarray(told["sizes"]) / num_tokens
    for name, share in (("smallest", shares.min(-1)), ("median", np.median(shares, -1))):
        assert logged[f"{name}_cluster"] == pytest.approx(share.mean())
    assert logged["largest_cluster"] == pytest.approx(shares.max(-1).mean())
    if selection == "paper":
        untaken = ~np.asarray(told["members"]).any(2)
        assert logged["untaken"] == pytest.approx(untaken.mean())


def test_queries_alone_do_not_choose_clusters():
    attention = make({"selection": "paper", "share_qk": False})
    query, key = normal(0, 1, 4, 4, 6), normal(1, 1, 8, 4, 6)
    inputs = Inputs(query, key, key, unrotated_query=query, unrotated_key=jnp.asarray(key))
    with pytest.raises(ValueError, match=r"share_qk=False.* 4 of 8$"):
        attention.attend(inputs, Shard(query_offset=4, num_heads=4))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"selection": "paper"}, {"tensor": 2, "context": 2, "data": 2}),
        ({"routed_relative": 3, "local_relative": 3}, {"tensor": 2, "context": 4}),
        ({"num_routed_heads": 4}, {"tensor": 4, "context": 2}),
    ],
    ids=str,
)
def test_is_the_same_on_a_mesh(options, sizes):
    assert_same_on_mesh(make(options), sizes, 32)


@pytest.mark.parametrize("options", [{"masks_self": False}, {"routed_relative": 3}], ids=str)
def test_the_future_changes_no_bit(options):
    attention = make({**options, "window_size": 20, "num_clusters": 5})
    run = jax.jit(lambda x: attention(x, jnp.mgrid[:4, :64][1], None).output)
    x, other = normal(0, 4, 64, 20), normal(1, 4, 64, 20)
    cut = np.array([1, 17, 40, 63])[:, None]
    is_past = np.arange(64) < cut
    before, after = run(x), run(np.where(is_past[..., None], x, 1e6 * other))
    np.testing.assert_array_equal(before[is_past], after[is_past])
    assert (before != after).any(-1)[~is_past].all()


def test_paper_selection_sees_the_future_and_says_so():
    attention = make({"selection": "paper"})
    run = jax.jit(lambda x: attention(x, jnp.mgrid[:1, :64][1], None).output)
    x = normal(0, 1, 64, 20)
    before, after = run(x), run(np.where(np.arange(64)[:, None] < 48, x, normal(1, 1, 64, 20)))
    assert (before != after)[:, :48].any()
    (note,) = routing.notes(attention.options)
    assert "not strictly causal" in note
    assert not routing.notes(routing.Options())


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"num_routed_heads": 5}, {}, r"num_routed_heads=5 .*num_heads=4; take at most 4"),
        ({"num_routed_heads": -1}, {}, r"num_routed_heads=-1 must not be negative"),
        ({}, {"model.num_kv_heads": 2}, r"num_routed_heads=2.*num_kv_heads=2"),
        ({}, {"mesh.tensor": 4}, r"num_routed_heads=2 leaves 2 routed heads.*mesh\.tensor=4"),
        ({"num_routed_heads": 4}, {"model.qk_norm": True}, r"=4 leaves no queries.*qk_norm=True"),
        ({"window_size": 600}, {}, r"window_size=600 .*seq_len=512; take at most 512"),
        ({"num_clusters": 513}, {}, r"num_clusters=513 .*seq_len=512; take at most 512"),
        ({"window_size": 0}, {}, r"window_size=0 must be at least 1"),
        ({"decay": 1.5}, {}, r"decay=1\.5 must be from 0 to 1"),
        ({"num_clusters": 0}, {}, r"num_clusters=0 must be at least 1"),
        ({"logit_scale": 0.0}, {}, r"logit_scale=0\.0 must be from 1e-6 to 1,000"),
        ({"logit_scale": 1e30}, {}, r"logit_scale=1e\+30 must be from 1e-6 to 1,000"),
        ({"commitment": 1e30}, {}, r"commitment=1e\+30 must be at most 1,000"),
        ({"share_qk": False}, {}, r"selection='causal' .*selection='paper'"),
        ({}, {"model.is_causal": False}, r"selection='causal' .*selection='paper'"),
        (
            {"share_qk": False, "selection": "paper"},
            {"mesh.context": 2},
            r"share_qk=False .*mesh\.context=2",
        ),
        (
            {"local_relative": 3, "implementation": "xla"},
            {},
            r"implementation='xla' .*local_relative=0",
        ),
        ({"selection": "balanced"}, {}, r"selection='balanced'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, changes, message):
    config = default_config.get_config()
    config.update_from_flattened_dict(changes)
    section = ConfigDict({"name": "routing", **options})
    with pytest.raises(ValueError, match=message) as error:
        routing.check(registry.options("attention", section), config)
    assert "\n" not in str(error.value)


@pytest.mark.exhaustive
def test_the_example_of_the_docstring_runs():
    names = {"nnx": nnx, "jnp": jnp, "ModelConfig": ModelConfig}
    example = doctest.DocTestParser().get_doctest(
        routing.__doc__, vars(routing) | names, "routing", None, 0
    )
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example).failed == 0
