"""Routing against the authors' code and against a popular port, which is another method.

`official_*` files run through the method itself; `port_*` files through its public parts,
put together as the port has them. Everything comes from the files: other shapes and settings
of the same form pass unchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseformer_jax.attention import _balanced, _clusters, _nearby, _routed_heads, _tiles, routing
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.model.config import ModelConfig
from sparseformer_jax.model.rotary import rotary
from tests.golden import loading
from tests.model.harness import assert_close

MANIFEST = loading.settings("routing", "manifest.json")
# Relative to the largest entry: float32 twice, its rounding once through a softmax.
OUTPUT, GRADIENT = 1e-5, 2e-5


def cases(kind):
    """The files of a kind, told by what is in them."""
    found = {}
    for name, entry in MANIFEST.items():
        settings, arrays = entry["settings"], entry["arrays"]
        what = "layer" if "w_o" in arrays else "update" if "means_after" in arrays else "core"
        if f"{settings['origin']} {what}" == kind:
            found[name] = settings
    return pytest.mark.parametrize(("name", "settings"), found.items(), ids=list(found))


@functools.cache
def load(name):
    arrays = loading.arrays("routing", name)
    shapes = {key: [list(x.shape), str(x.dtype)] for key, x in arrays.items()}
    assert shapes == MANIFEST[name]["arrays"]
    return jax.tree.map(jnp.asarray, arrays)


def tokens_first(x):
    """[B, H, n, d] to [B, n, H, d] and back."""
    return jnp.swapaxes(x, 1, 2)


def check(actual, arrays, tolerance):
    assert_close(actual, {name: arrays[name] for name in actual}, tolerance)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def authors_options(settings, **options):
    return routing.Options(
        num_clusters=settings["clusters"],
        window_size=settings["window"],
        selection="paper",
        share_qk=settings["shared_qk"],
        masks_self=False,
        logit_scale=1.0,
        centroid_update="released",
        **options,
    )


@cases("official core")
def test_routed_heads(name, settings):
    arrays = load(name)
    options = authors_options(settings)
    operands = {key: jnp.asarray(arrays[key]) for key in ("q", "k", "v") if key in arrays}
    means, num_tokens = jnp.asarray(arrays["means"]), arrays["v"].shape[2]
    scores = {"scale": 1.0, "masks_self": False}

    def vectors(q, k=None):
        query = _routed_heads.vectors(tokens_first(q), means)
        return query, query if k is None else _routed_heads.vectors(tokens_first(k), means)

    def attend(v, **x):
        query, key = vectors(**x)
        value = tokens_first(v)
        inputs = Inputs(query.x, key.x, value)
        is_causal = settings["causal"]
        output, diagnostics = _routed_heads.attend_balanced(
            options, inputs, Shard(), query, key, value, is_causal, scores
        )
        out = tokens_first(output)
        return jnp.vdot(out, arrays["cotangent"]), (out, diagnostics)

    def loss(v, **x):
        kinds = vectors(**x)
        losses = [_clusters.commitment(kind.x, means, kind.nearest).mean() for kind in kinds]
        return options.commitment * sum(losses)

    def gradients(function, prefix, **aux):
        grad = jax.jit(jax.grad(lambda x: function(**x), **aux))(operands)
        grad, rest = grad if aux else (grad, None)
        found = {f"{prefix}{key}": x for key, x in grad.items() if f"{prefix}{key}" in arrays}
        check(found, arrays, GRADIENT)
        return rest

    out, diagnostics = gradients(attend, "grad_", has_aux=True)
    gradients(loss, "grad_aux_")
    check({"out": out, "aux_loss": loss(**operands)}, arrays, OUTPUT)

    query, key = vectors(**{key: x for key, x in operands.items() if key != "v"})
    of_query, of_key = (_balanced.best(kind.scores, settings["window"]) for kind in (query, key))
    np.testing.assert_array_equal(of_query, arrays["q_index"])
    np.testing.assert_array_equal(of_key, arrays["k_index"])
    hits = _balanced.times(of_query, num_tokens)
    np.testing.assert_array_equal(hits, arrays["hits"])
    assert diagnostics["untaken"] == pytest.approx((arrays["hits"] == 0).mean())
    is_visible = of_key[..., None, :] <= of_query[..., None]
    is_visible |= not settings["causal"]
    queries, keys = _balanced.picked(query.x, of_query), _balanced.picked(key.x, of_key)
    one_hot = jnp.broadcast_to(jnp.eye(keys.shape[-2]), (*keys.shape[:-1], keys.shape[-2]))
    check({"weights": _tiles.attend(queries, keys, one_hot, is_visible, scale=1.0)}, arrays, OUTPUT)


def model(width, num_heads, head_dim, **settings):
    return ModelConfig(
        vocab_size=1,
        num_layers=1,
        embed_dim=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        mlp_dim=1,
        **settings,
    )


def authors_layer(arrays, settings):
    """The module with a file's parameters, and how their heads are ours: [routed, local]."""
    routed, local, window = (settings[n] for n in ("routed_heads", "local_heads", "block"))
    num_heads, width = routed + local, settings["D"]
    head_dim = arrays["means"].shape[-1]
    assert settings["flange"] % window == 0
    options = authors_options(
        settings,
        num_routed_heads=routed,
        routed_relative=settings["max_relative"],
        local_relative=settings["max_relative"],
        block_size=window,
        local_blocks=settings["flange"] // window + 1,
    )
    config = model(width, num_heads, head_dim, is_causal=settings["causal"], position="none")
    module = routing.Method(config, options, rngs=nnx.Rngs(0))
    module.centroids[...] = jnp.asarray(arrays["means"])
    is_routed = np.diff(np.arange(num_heads + 1) * routed // num_heads) > 0
    return module, np.concatenate([np.flatnonzero(is_routed), np.flatnonzero(~is_routed)])


def parameters_of(arrays, module, order, prefix=""):
    """A file's parameters, or their gradients, by the module's paths.

    The authors' shared vector is their query's, which they scale down before LayerNorm's
    epsilon: ours is the key's, so both stand there, and a gradient is scaled up instead.
    """
    config, options = module.config, module.options
    routed, head_dim = options.routed(config.num_heads), config.head_dim
    scale = head_dim**-0.5 if not prefix else head_dim**0.5
    query, key, value = (
        arrays[f"{prefix}w_{name}"].reshape(config.embed_dim, -1, head_dim) for name in "qkv"
    )
    place = np.argsort(order)  # of our heads among theirs
    local = np.sort(order[routed:])
    if options.share_qk:
        key = np.concatenate([scale * query[:, :routed], key[:, routed:]], axis=1)
        query = query[:, place[local]]
    else:
        query = query[:, place]
    output = arrays[f"{prefix}w_o"].reshape(-1, head_dim, config.embed_dim)

    def tables(kind):
        return {n: arrays[f"{prefix}{kind}_rel_{n}"] for n in ("key", "value")}

    return {
        "query": {"kernel": query},
        "key": {"kernel": key[:, place]},
        "value": {"kernel": value[:, place]},
        "out": {"kernel": output[place], "shared": arrays[f"{prefix}w_headmix"]},
        "routed_relative": tables("route"),
        "local_relative": tables("local"),
    }


@cases("official layer")
def test_layer(name, settings):
    arrays = load(name)
    module, order = authors_layer(arrays, settings)
    parameters = jax.tree.map(jnp.asarray, parameters_of(arrays, module, order))
    graphdef, state, variables = nnx.split(module, nnx.Param, ...)
    x = jnp.asarray(arrays["x"])

    def run(parameters, x):
        nnx.replace_by_pure_dict(state, parameters)
        module = nnx.merge(graphdef, state, variables)
        attended = module(x, jnp.mgrid[: x.shape[0], : x.shape[1]][1], None)
        (loss,) = attended.losses.values()
        found = {"out": attended.output, "aux_loss": loss / (x.shape[0] * x.shape[1])}
        return jnp.vdot(attended.output, arrays["cotangent"]), found

    (gradients, of_x), found = jax.jit(jax.grad(run, (0, 1), has_aux=True))(parameters, x)
    check(found, arrays, OUTPUT)
    check({"grad_x": of_x}, arrays, GRADIENT)
    assert_close(gradients, parameters_of(arrays, module, order, "grad_"), GRADIENT)
    if settings["shared_qk"]:
        unused = arrays["grad_w_k"].reshape(x.shape[-1], -1, module.config.head_dim)
        assert not unused[:, : settings["routed_heads"]].any()
    key = jnp.einsum("btd,dnh->btnh", x, parameters["key"]["kernel"])
    heads = order[: settings["routed_heads"]]
    vectors = _routed_heads.vectors(key[:, :, heads], jnp.asarray(arrays["means"]))
    np.testing.assert_array_equal(
        _balanced.best(vectors.scores, settings["window"]), arrays["q_index"]
    )


def steps_of(arrays, settings):
    """Each step's normalised tokens, and its centroids as they stand before it."""
    options = routing.Options(
        num_clusters=settings["clusters"], decay=settings["decay"], centroid_update="released"
    )
    means = jnp.asarray(arrays["means0"])
    return options, {"centroids": means, "counts": jnp.zeros(means.shape[:2]), "sums": means}


def statistics_of(x, variables, counts_as_released):
    """What a step's tokens [B, H, n, d] are to their nearest centroids."""
    centroids = variables["centroids"]
    vectors = _routed_heads.vectors(tokens_first(x), centroids)
    ones = jnp.ones(vectors.x.shape[:2])
    counts, sums = _clusters.members(vectors.x, vectors.nearest, ones, centroids.shape[1])
    if counts_as_released:
        # Their slip: the one-hot [B, H, n, K] reshaped to [-1, H, K], which mixes heads.
        heads, clusters = counts.shape
        one_hot = jax.nn.one_hot(vectors.nearest, clusters)
        counts = one_hot.reshape(-1, heads, clusters).sum(0)
    loss = 1e-4 * _clusters.commitment(vectors.x, centroids, vectors.nearest).mean()
    return {"counts": counts[:, None], "sums": sums[:, None]}, vectors.nearest, loss


@cases("official update")
def test_centroids(name, settings):
    arrays = load(name)
    options, variables = steps_of(arrays, settings)
    for step, x in enumerate(jnp.asarray(arrays["x"])):
        statistics, nearest, loss = statistics_of(x, variables, counts_as_released=True)
        variables = routing.Method.update(options, variables, statistics)
        np.testing.assert_array_equal(nearest, arrays["nearest"][step])
        found = {
            "aux_loss": loss,
            "ema_count": variables["counts"],
            "ema_means": variables["sums"],
            "means_after": variables["centroids"],
        }
        check(found, {n: arrays[n][step] for n in found}, OUTPUT)


@cases("official update")
def test_centroids_with_each_heads_own_count(name, settings):
    arrays = load(name)
    options, variables = steps_of(arrays, settings)
    statistics, nearest, loss = statistics_of(arrays["x"][0], variables, counts_as_released=False)
    np.testing.assert_array_equal(nearest, arrays["nearest"][0])
    number = np.stack(
        [
            np.bincount(row, minlength=settings["clusters"])
            for row in np.swapaxes(arrays["nearest"][0], 0, 1).reshape(settings["H"], -1)
        ]
    )
    np.testing.assert_array_equal(statistics["counts"][:, 0], number)
    sums = routing.Method.update(options, variables, statistics)["sums"]
    found = {"aux_loss": loss, "ema_means": sums}
    check(found, {n: arrays[n][0] for n in found}, OUTPUT)


def port_attend(q, k, v, means, settings, mem_key=None, mem_value=None, mask=None):
    """The port's routed heads [B, H, n, d]: output, loss, and the positions taken."""
    num_tokens, head_dim = q.shape[2:]
    query, value = tokens_first(q), tokens_first(v)
    key = unit(query) if k is None else tokens_first(k)
    both = [unit(query)] if k is None else [unit(query), unit(key)]
    scores = [_clusters.scores(x, means) for x in both]
    taken = [_balanced.best(s, settings["window"]) for s in scores]
    of_query, of_key = taken[0], taken[-1]
    visible = jnp.ones((*of_query.shape, of_key.shape[-1]), bool)
    if settings["causal"]:
        visible &= of_key[..., None, :] <= of_query[..., None]
    if mask is not None:
        is_real = jax.vmap(lambda row, at: row[at])
        visible &= is_real(mask, of_query)[..., None] & is_real(mask, of_key)[..., None, :]
    itself = (of_key[..., None, :] == of_query[..., None]) & settings["shared_qk"]
    keys, values = _balanced.picked(key, of_key), _balanced.picked(value, of_key)
    if mem_key is not None:
        keys, values = (
            jnp.concatenate([jnp.broadcast_to(m, (*x.shape[:3], *m.shape[2:])), x], axis=3)
            for m, x in ((mem_key, keys), (mem_value, values))
        )
        front = [(0, 0)] * 4 + [(mem_key.shape[2], 0)]
        visible = jnp.pad(visible, front, constant_values=True)
        itself = jnp.pad(itself, front)
    read = _tiles.attend(
        _balanced.picked(query, of_query),
        keys,
        values,
        visible,
        scale=head_dim**-0.5,
        last_resort=itself,
    )
    out = tokens_first(_balanced.mean(read, of_query, num_tokens, 1e-5))
    losses = [
        _clusters.commitment(x, means, jnp.argmax(s, axis=2)).mean()
        for x, s in zip(both, scores, strict=True)
    ]
    return out, 1e-4 * sum(losses) / len(losses), (of_query, of_key)


@cases("port core")
def test_port(name, settings):
    arrays = load(name)
    names = [n for n in ("q", "k", "v", "mem_key", "mem_value") if n in arrays]
    operands = {n: jnp.asarray(arrays[n]) for n in names}
    attend = functools.partial(
        port_attend, means=arrays["means"], settings=settings, mask=arrays.get("mask")
    )

    def total(x):
        out, loss, taken = attend(**{"k": None} | x)
        return jnp.vdot(out, arrays["cotangent"]), (out, loss, taken)

    gradients, (out, loss, taken) = jax.jit(jax.grad(total, has_aux=True))(operands)
    check({"out": out, "aux_loss": loss}, arrays, OUTPUT)
    check({f"grad_{n}": x for n, x in gradients.items()}, arrays, GRADIENT)
    of_loss = jax.jit(jax.grad(lambda x: total(x)[1][1]))(operands)
    kinds = [n for n in ("q", "k") if n in operands]
    check({f"grad_aux_{n}": of_loss[n] for n in kinds}, arrays, GRADIENT)
    for index, key in zip(taken, ("q_index", "k_index"), strict=True):
        np.testing.assert_array_equal(index, np.sort(arrays[key], axis=-1))
    hits = _balanced.times(taken[0], out.shape[2])
    np.testing.assert_array_equal(hits, arrays["hits"])


@cases("port layer")
def test_port_layer(name, settings):
    arrays = load(name)
    local, head_dim = settings["local_heads"], settings["d"]
    operands = {"x": arrays["x"]} | {n: arrays[n] for n in arrays if n.startswith(("w_", "b_"))}
    operands = jax.tree.map(jnp.asarray, operands)
    config = model(operands["x"].shape[-1], local, head_dim)

    def split(y):
        return y.reshape(*y.shape[:2], -1, head_dim)

    def run(p):
        x = p["x"]
        positions = jnp.mgrid[: x.shape[0], : x.shape[1]][1]
        nearby = map(split, jnp.split(x @ p["w_local_qkv"] + p["b_local_qkv"], 3, axis=-1))
        query, key, value = nearby
        assert query.shape[2] == local
        of_local = _nearby.attend(
            rotary(query, positions, config),
            rotary(key, positions, config),
            value,
            settings["local_window"],
            2,
            is_causal=settings["causal"],
            scale=head_dim**-0.5,
        )
        key = None if settings["shared_qk"] else tokens_first(split(x @ p["w_k"]))
        query, value = (tokens_first(split(x @ p[n])) for n in ("w_q", "w_v"))
        of_routed, loss, _ = port_attend(query, key, value, arrays["means"], settings)
        heads = jnp.concatenate([of_local, tokens_first(of_routed)], axis=2)
        out = heads.reshape(*x.shape[:2], -1) @ p["w_o"]
        return jnp.vdot(out, arrays["cotangent"]), {"out": out, "aux_loss": loss}

    gradients, found = jax.jit(jax.grad(run, has_aux=True))(operands)
    check(found, arrays, OUTPUT)
    check({f"grad_{n}": x for n, x in gradients.items()}, arrays, GRADIENT)


@cases("port update")
def test_port_centroids(name, settings):
    """Directions of the sums, averaged over passes, and a moving average of those."""
    arrays = load(name)
    passes, means = int(arrays["accum"]), jnp.asarray(arrays["means0"])
    x = arrays["x"].reshape(-1, passes, *arrays["x"].shape[1:])
    for step, tokens in enumerate(x):
        found = []
        for each, y in enumerate(unit(tokens_first(y)) for y in tokens):
            nearest = jnp.argmax(_clusters.scores(y, means), axis=2)
            np.testing.assert_array_equal(nearest, arrays["nearest"][step * passes + each])
            loss = 1e-4 * _clusters.commitment(y, means, nearest).mean()
            assert_close(loss, arrays["aux_loss"][step * passes + each], OUTPUT)
            counts, sums = _clusters.members(y, nearest, jnp.ones(y.shape[:2]), means.shape[1])
            found.append(jnp.where(counts[..., None] > 0, unit(sums), means))
        means = settings["decay"] * means + (1 - settings["decay"]) * sum(found) / passes
        assert_close(means, arrays["means_after"][step], OUTPUT)
