"""Combiner written out: for every query the tokens and spans it sees, as sets. Run in float64.

A span is its tokens in the query's document; none is shared between queries that do not see
the same ones, so nothing here knows of blocks, padding or last documents.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.model import reference


def lists(variant, num_tokens, size, is_causal, documents):
    """For every query: its direct tokens, and its spans as (tokens, the one that reads)."""
    found = []
    for i in range(num_tokens):
        mates = [j for j in range(num_tokens) if documents[j] == documents[i]]
        if is_causal:
            mates = [j for j in mates if j <= i]
        direct, spans = WHAT[variant](i, mates, size, num_tokens)
        spans = [span for span in spans if span]
        reader = [min(span, key=lambda j: abs(j % size - i % size)) for span in spans]
        found.append((direct, list(zip(spans, reader, strict=True))))
    return found


def fixed(i, mates, size, num_tokens):
    blocks = {j // size for j in mates} - {i // size}
    spans = [[j for j in mates if j // size == block] for block in sorted(blocks)]
    return [j for j in mates if j // size == i // size], spans


def log_sparse(i, mates, size, num_tokens):
    def past(i):
        start, spans = 0, []
        for digit in reversed(range(i.bit_length())):
            if i >> digit & 1:
                spans.append(range(start, start + 2**digit))
                start += 2**digit
        return spans

    last = num_tokens - 1
    spans = past(i) + [[last - j for j in span] for span in past(last - i)]
    return [i], [[j for j in span if j in mates] for span in spans]


def axial_mixture(i, mates, size, num_tokens):
    row, column = divmod(i, size)
    cells = [(j, *divmod(j, size)) for j in mates]
    direct = [j for j, r, c in cells if r == row or c == column]
    spans = []
    for other in range(size):
        if other != column:
            spans.append([j for j, r, c in cells if c == other and r < row])
            spans.append([j for j, r, c in cells if c == other and r > row])
    for other in range(-(-num_tokens // size)):
        if other != row:
            spans.append([j for j, r, c in cells if r == other and c < column])
            spans.append([j for j, r, c in cells if r == other and c > column])
    return direct, spans


WHAT = {
    "fixed": fixed,
    "axial_row": fixed,  # the difference is in what a span's pair is
    "axial_mixture": axial_mixture,
    "log_sparse": log_sparse,
}


def tables(variant, num_tokens, size, is_causal, documents):
    """The same as arrays: direct [T, T], what a query sees of spans [T, R], their tokens and readers."""
    seen = lists(variant, num_tokens, size, is_causal, documents)
    by_row = variant == "axial_row"
    names = sorted(
        {(reader if by_row else -1, tuple(span)) for _, spans in seen for span, reader in spans}
    )
    direct, uses = np.zeros((num_tokens, num_tokens), bool), np.zeros((num_tokens, len(names)), int)
    for i, (tokens, spans) in enumerate(seen):
        direct[i, tokens] = True
        for span, reader in spans:
            uses[i, names.index((reader if by_row else -1, tuple(span)))] += 1
    members = np.zeros((len(names), num_tokens), bool)
    for number, (_, span) in enumerate(names):
        members[number, list(span)] = True
    return direct, uses, members, np.array([reader for reader, _ in names], int)


def attention(p, x, positions, documents, config, options):
    """Returns the module's output [T, D] and weights [N, T, T] for one row x [T, D]."""
    num_tokens, size = len(x), min(options.span_size, len(x))
    direct, uses, members, readers = tables(
        options.variant, num_tokens, size, config.is_causal, documents
    )
    query, key, value = (reference.linear(p[name], x) for name in ("query", "key", "value"))

    def rotated(x, positions):
        if config.position != "rope":
            return x
        return reference.rotate(x[None], positions[None], config.rope_theta)[0]

    query, key = rotated(query, positions), rotated(key, positions)
    group = config.num_heads // config.num_kv_heads
    key, value = (jnp.repeat(x, group, axis=1) for x in (key, value))
    scale, cap = config.attention_scale or config.head_dim**-0.5, config.attention_soft_cap
    inside = members[:, :, None, None]

    def logits(product):
        return cap * jnp.tanh(scale * product / cap) if cap else scale * product

    def pooled(x, name):
        y = jnp.maximum(x @ p[name]["kernel"], 0) if options.pool == "deepsets" else x
        if options.mixture_pool == "sum":
            return jnp.where(inside, y, 0).sum(1)
        y = jnp.where(inside, y, -jnp.inf).max(1)
        is_one = (members.sum(1) == 1) & (options.variant == "log_sparse")
        return jnp.where(is_one[:, None, None], jnp.where(inside, x, 0).sum(1), y)

    by_row = options.variant == "axial_row"
    reading = query[readers] if by_row else pooled(query, "pool_query")
    products = logits(jnp.einsum("rnh,snh->rsn", reading, key))
    shares = jax.nn.softmax(jnp.where(members[..., None], products, -jnp.inf), axis=1)  # [R, S, N]
    if by_row:
        read = jnp.einsum("rsn,snh->rnh", shares, value)
        mapped = x[readers] + reference.linear(p["row"], read, 2) + p.get("row_bias", 0)
        normed = reference.norm(p["row_norm"], mapped, "layernorm", config.norm_eps)
        span_key = rotated(reference.linear(p["row_key"], normed), positions[readers])
    else:
        span_key = pooled(key, "pool_key")
    near = jnp.where(direct[..., None], logits(jnp.einsum("tnh,snh->tsn", query, key)), -jnp.inf)
    far = logits(jnp.einsum("tnh,rnh->trn", query, span_key))
    far = jnp.where(uses[..., None] > 0, far + np.log(np.maximum(uses, 1))[..., None], -jnp.inf)
    joint = jax.nn.softmax(jnp.concatenate([near, far], axis=1), axis=1)
    weights = joint[:, :num_tokens] + jnp.einsum("trn,rsn->tsn", joint[:, num_tokens:], shares)
    attended = jnp.einsum("tsn,snh->tnh", weights, value)
    return reference.linear(p["out"], attended, 2), weights.transpose(2, 0, 1)
