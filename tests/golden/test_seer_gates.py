"""The gates of SeerAttention against the released modules: scores, losses, gradients, choices.

Everything comes from the files: other shapes, seeds and settings pass unchanged.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import BlockMask, block_sparse_attention
from sparseformer_jax.attention import _block_choice, _gates
from sparseformer_jax.model.config import ModelConfig
from tests.golden import loading
from tests.golden.test_seer import FILES, cases

# Sums of some hundred products in float32, of numbers around one: the files' own logits were
# found anew within 2e-5.
TOLERANCE = 2e-5
HIDDEN = -1e20


def model_config(config):
    return ModelConfig(
        vocab_size=8,
        num_layers=1,
        embed_dim=8,
        num_heads=config["q_heads"],
        num_kv_heads=config["kv_heads"],
        head_dim=config["head_dim"],
        mlp_dim=8,
        rope_theta=config["theta"],
        position="rope" if config.get("rope_in_gate", True) else "none",
    )


def pools(name):
    """ "Kmaxminavg" -> max, min, avg."""
    return tuple(kind for kind in _gates.POOLS if kind in name)


def make_gate(config, stored):
    """The gate of a file, with its weights."""
    if config["kind"] == "prefill":
        of_queries, of_keys = config["gate_type"].split("_")
        options = {
            "gates": "prefill",
            "query_pools": pools(of_queries),
            "query_projection": "head" if "w_q" in stored else "none",
        }
    else:
        of_keys = config["k_pool"]
        kinds = {"Qproj": "group", "Qavgproj": "average", "Qavg": "none"}
        options = {
            "gates": "decode",
            "query_projection": kinds[config["q_head_pool"]],
            "gate_norm": config["qk_norm"],
        }
    options = _gates.GateOptions(
        block_size=config["block"], gate_dim=config["gate_dim"], key_pools=pools(of_keys), **options
    )
    gate = _gates.BlockGate(model_config(config), options, rngs=nnx.Rngs(0))
    of_norms = {"qnorm": "query_norm", "knorm": "key_norm"}
    for name, module in of_norms.items():
        if name in stored:
            getattr(gate, module).scale[...] = stored[name]
    for name, variable in {"w_q": gate.query, "w_k": gate.key}.items():
        if name in stored:
            assert variable.shape == stored[name].shape
            variable[...] = stored[name]
    return gate


def everything(x):
    return jnp.ones(x.shape[:2], bool)


def close(actual, expected, tolerance=TOLERANCE):
    limit = tolerance * max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=limit)


def prefill_scores(gate, stored):
    query, key = (jnp.asarray(stored[x]) for x in ("q_nope", "k_nope"))
    options = gate.options
    positions = jnp.asarray(stored["block_position_ids"])
    query = _gates.pool(query, options.block_size, options.query_pools, everything(query))
    key = _gates.pool(key, options.block_size, options.key_pools, everything(key))
    return _gates.scores(gate.queries(query, positions), gate.keys(key, positions)), query, key


def padded_blocks(config):
    """How many blocks of each row are padding alone [B]."""
    lengths = config.get("leftpad") or [0] * config["batch"]
    return np.asarray(lengths) // config["block"]


def prefill_visible(config, stored):
    """Blocks before or at the row's own, but for padding [B, 1, M, J]."""
    num_blocks = stored["gate_logits"].shape[-1]
    block = np.arange(num_blocks)
    real = block >= padded_blocks(config)[:, None]
    visible = (block <= block[:, None]) & (real[:, :, None] & real[:, None])[:, None]
    return jnp.asarray(visible), real


def on_real_rows(x, real):
    """Rows [B, n, M, J] of blocks that hold a token, one after another."""
    return np.moveaxis(np.asarray(x), 1, 2)[real]


@cases("prefill", "gate_logits")
def test_prefill_scores(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    found, query, key = prefill_scores(make_gate(config, stored), stored)
    close(query, stored["q_pooled"])
    close(key, stored["k_pooled"])
    visible, real = prefill_visible(config, stored)
    np.testing.assert_array_equal(visible, stored["block_mask_additive"] == 0)
    seen = np.broadcast_to(visible, found.shape)
    close(np.asarray(found)[seen], stored["gate_logits"][seen])
    shares = np.where(seen, np.exp(_block_choice.log_shares(found, visible)), 0)
    close(on_real_rows(shares, real), on_real_rows(stored["gate_probs"], real))


@cases("prefill", "loss_kl_mean")
def test_prefill_target_loss_and_gradients(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    gate = make_gate(config, stored)
    visible, _ = prefill_visible(config, stored)
    target = _block_choice.shares_of(jnp.asarray(stored["gt_raw"]), visible)
    close(target, stored["gt"], 1e-6)
    first = stored["first_row_in_loss"]
    num_blocks = visible.shape[-1]
    assert first == num_blocks // 4

    def loss(gate):
        found, _, _ = prefill_scores(gate, stored)
        rows = _block_choice.divergence(target, found, visible)[..., first:]
        return jnp.mean(rows) / num_blocks, rows

    (mean, rows), gradients = nnx.value_and_grad(loss, has_aux=True)(gate)
    close(rows, stored["kl_per_row"])
    # The mean of terms that cancel in part.
    np.testing.assert_allclose(mean, stored["loss_kl_mean"], rtol=TOLERANCE, atol=3e-7)
    assert_gradients(gradients, stored)


def assert_gradients(gradients, stored):
    found = {
        "w_q": gradients.get("query"),
        "w_k": gradients.get("key"),
        "qnorm": gradients.get("query_norm", {}).get("scale"),
        "knorm": gradients.get("key_norm", {}).get("scale"),
    }
    compared = [name for name in found if f"grad_{name}" in stored]
    assert compared
    for name in compared:
        expected = stored[f"grad_{name}"]
        actual = found[name][...]
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE * np.abs(expected).max())


@cases("prefill", "gate_probs")
def test_prefill_choices(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    found, _, _ = prefill_scores(make_gate(config, stored), stored)
    visible, real = prefill_visible(config, stored)
    num_blocks = visible.shape[-1]
    compared = 0
    for array, expected in stored.items():
        match = re.fullmatch(r"mask_(threshold|nz)_(.+)_(plain|lastdense)", array)
        if not match:
            continue
        kind, number, rows = match.groups()
        if kind == "threshold":
            chosen = _block_choice.above(found, visible, float(number))
        else:
            count = _block_choice.count_of_density(float(number), num_blocks)
            assert count == stored[f"topk_nz_{number}"]
            chosen = _block_choice.highest(found, visible, count)
        if rows == "lastdense":
            last = np.arange(num_blocks)[:, None] >= num_blocks - 2
            chosen = chosen | (last & (np.arange(num_blocks) <= np.arange(num_blocks)[:, None]))
        # Padding that is attended to, and by padding, says nothing.
        seen = np.broadcast_to(visible, expected.shape)
        np.testing.assert_array_equal(np.asarray(chosen)[seen], expected[seen], err_msg=array)
        compared += 1
    assert compared


def sequences(stored):
    starts = stored["cu_seqlens"]
    return [slice(*ends) for ends in zip(starts[:-1], starts[1:], strict=True)]


def decode_scores(gate, stored, where):
    """Scores [1, K, L, j] of a sequence alone."""
    query, key = (jnp.asarray(stored[x][where])[None] for x in ("q_nope", "k_nope"))
    pooled = _gates.pool(key, gate.options.block_size, gate.options.key_pools, everything(key))
    blocks = gate.options.block_size * jnp.arange(pooled.shape[1])
    queries = gate.queries(query, jnp.arange(query.shape[1])[None])
    return _gates.scores(queries, gate.keys(pooled, blocks[None]))


def past(length, size):
    tokens = np.arange(length)
    return jnp.asarray(np.arange(-(-length // size)) < tokens[:, None] // size)


@cases("decode_train", "gate_logits")
def test_decode_scores(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    gate = make_gate(config, stored)
    for number, where in enumerate(sequences(stored)):
        found = decode_scores(gate, stored, where)[0]
        visible = past(found.shape[1], config["block"])
        blocks = visible.shape[-1]
        expected = stored["gate_logits"][number, :, : len(visible)]
        close(np.where(visible, found, HIDDEN), expected[..., :blocks])
        np.testing.assert_array_equal(visible, stored["block_mask"][: len(visible), :blocks])


@cases("decode_train", "loss_kl_mean")
def test_decode_target_loss_and_gradients(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    gate = make_gate(config, stored)
    num_columns = stored["gt"].shape[-1]

    def loss(gate):
        means = []
        for number, where in enumerate(sequences(stored)):
            found = decode_scores(gate, stored, where)
            length, blocks = found.shape[2:]
            visible = past(length, config["block"])
            maxima = jnp.asarray(stored["gt_tok"])[number : number + 1, :, :length, :blocks]
            groups = maxima.reshape(1, config["kv_heads"], -1, length, blocks).max(2)
            target = _block_choice.shares_of(groups, visible, epsilon=1e-9)
            close(target[0], stored["gt"][number, :, :length, :blocks], 1e-6)
            first = int(length * config["loss_slice_ratio"])
            rows = _block_choice.divergence(target, found, visible)[:, :, first:]
            means.append(jnp.mean(rows) / num_columns)
        return sum(means) / len(means), means

    (mean, means), gradients = nnx.value_and_grad(loss, has_aux=True)(gate)
    np.testing.assert_allclose(means, stored["loss_per_seq"], rtol=TOLERANCE, atol=3e-7)
    np.testing.assert_allclose(mean, stored["loss_kl_mean"], rtol=TOLERANCE, atol=3e-7)
    assert_gradients(gradients, stored)


@cases("decode_infer", "kc_final_official")
def test_decode_cached_keys(name):
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    keys = cached_keys(make_gate(config, stored), config, stored)
    whole = stored["kc_block_start_rope"].shape[1]
    assert whole == stored["k_nope"].shape[1] // config["block"]
    for rule in ("start", "end"):
        close(keys[rule][:, :whole], stored[f"kc_block_{rule}_rope"])
    prefilled = config["prefill_len"] // config["block"]
    close(keys["start"][:, :prefilled], stored["kc_after_prefill"][:, :prefilled])
    mixed = np.concatenate([keys["start"][:, :prefilled], keys["end"][:, prefilled:whole]], axis=1)
    close(mixed, stored["kc_final_official"][:, :whole])


def cached_keys(gate, config, stored):
    """Pooled keys [B, J, K, D] that turn by their first or by their last token."""
    key, size = jnp.asarray(stored["k_nope"]), config["block"]
    pooled = _gates.pool(key, size, gate.options.key_pools, everything(key))
    ends = np.append(np.arange(1, pooled.shape[1]) * size, key.shape[1]) - 1
    starts = np.arange(pooled.shape[1]) * size
    places = {"start": starts, "end": ends}
    positions = stored["position_ids"]
    return {rule: gate.keys(pooled, jnp.asarray(positions[:, at])) for rule, at in places.items()}


@cases("decode_infer", "mask_budget")
def test_decode_choices(name):
    """As released: unfinished blocks score 0, and those finished while decoding turn late."""
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    gate = make_gate(config, stored)
    keys = cached_keys(gate, config, stored)
    size, prefilled = config["block"], config["prefill_len"] // config["block"]
    block = np.arange(keys["start"].shape[1])[:, None, None]
    released = np.where(block < prefilled, keys["start"], keys["end"])
    for step in range(config["steps"]):
        place = config["prefill_len"] + step
        query = jnp.asarray(stored["q_nope"][:, place : place + 1])
        query = gate.queries(query, jnp.asarray(stored["position_ids"][:, place : place + 1]))
        is_whole = (block + 1) * size <= place + 1
        found = _gates.scores(query, jnp.asarray(np.where(is_whole, released, 0)))
        visible = jnp.asarray(stored["block_mask"][step])[:, None, None]
        newest = np.arange(len(block)) == place // size
        chosen = {
            "thresh": _block_choice.above(found, visible, config["threshold"]),
            "budget": _block_choice.highest(found, visible, config["block_budget"]),
        }
        for kind, choice in chosen.items():
            expected = stored[f"mask_{kind}"][step]
            np.testing.assert_array_equal((choice | newest)[:, :, 0], expected, err_msg=kind)


@cases("prefill", "attn_out_sparse")
def test_sparse_outputs(name):
    """Of the first threshold, with dense last rows; the release's masks may lack a row's own."""
    config, stored = FILES[name]["config"], loading.arrays("seer", name)
    chosen = jnp.asarray(stored[f"mask_threshold_{config['thresholds'][0]}_lastdense"])
    length, size = config["seq"], config["block"]
    mask = BlockMask.from_block_map(chosen, length, length, size, size, is_causal=True)
    arrays = (jnp.asarray(stored[x]) for x in ("q_rope", "k_rope", "v"))
    output = jax.jit(lambda *x: block_sparse_attention(*x, is_causal=True))(*arrays, mask)
    close(np.moveaxis(output, 1, 2), stored["attn_out_sparse"])
