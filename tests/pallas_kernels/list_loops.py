"""A backend in plain loops over the kernel lists: what they mean, as code."""

import jax
import jax.numpy as jnp
import numpy as np


def _entries(lists, batch, pattern, row):
    b = min(batch, lists.counts.shape[0] - 1)
    for slot in range(int(lists.counts[b, pattern, row])):
        yield int(lists.tiles[b, pattern, row, slot]), int(lists.bits[b, pattern, row, slot])


def _mask(plan, tiling, tables, batch, m, j, bits):
    geometry = plan.geometry
    query = np.arange(tiling.query_tile)[:, None]
    key = np.arange(tiling.key_tile)
    if bits == 0:
        return np.ones((tiling.query_tile, tiling.key_tile), bool)
    word = query // tiling.query_granule * tiling.key_granules + key // tiling.key_granule
    mask = (np.uint32(bits & 0xFFFFFFFF) >> word.astype(np.uint32)) & 1 == 1
    key = key + j * tiling.key_tile
    offset = int(tables.query_offset[min(batch, len(tables.query_offset) - 1)])
    position = query + m * tiling.query_tile
    mask = mask & (key < geometry.key_length) & geometry.pairs(position + offset, key)
    if tables.segments is not None:
        ids = np.asarray(tables.segments.query[batch])[position]
        mask = mask & (ids == np.asarray(tables.segments.key[batch])[key])
    return mask


def _logits(scores, raw):
    scaled, cap = raw * scores.scale, scores.soft_cap
    return scaled if cap is None else cap * np.tanh(scaled / cap)


def _slope(scores, logits):
    cap = scores.soft_cap
    return scores.scale if cap is None else scores.scale * (1 - (logits / cap) ** 2)


def _tile(array, batch, head, number, size):
    return array[batch, number * size : (number + 1) * size, head]


def forward(plan, query, key, value, tables):
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    tiling, lists = plan.forward, tables.forward
    patterns = lists.counts.shape[1]
    out, lse = np.zeros(query.shape), np.full((batch, heads, length), -np.inf)
    for b, n, m in np.ndindex(batch, heads, length // tiling.query_tile):
        rows = slice(m * tiling.query_tile, (m + 1) * tiling.query_tile)
        q = _tile(query, b, n, m, tiling.query_tile)
        logits, values = [np.full((len(q), 1), -np.inf)], [np.zeros((1, q.shape[1]))]
        for j, bits in _entries(lists, b, n * patterns // heads, m):
            s = _logits(plan.scores, q @ _tile(key, b, n // group, j, tiling.key_tile).T)
            mask = _mask(plan, tiling, tables, b, m, j, bits)
            logits.append(np.where(mask, s, -np.inf))
            values.append(_tile(value, b, n // group, j, tiling.key_tile))
        s = np.concatenate(logits, 1)
        peak = np.maximum(s.max(1, keepdims=True), -1e30)
        total = np.exp(s - peak).sum(1, keepdims=True)
        weights = np.exp(s - peak) / np.where(total == 0, 1, total)
        out[b, rows, n] = weights @ np.concatenate(values)
        with np.errstate(divide="ignore"):
            lse[b, n, rows] = (peak + np.log(total))[:, 0]
    return out, lse


def backward(plan, query, key, value, tables, lse, shift, d_out):
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    d_query, d_key, d_value = (np.zeros(x.shape) for x in (query, key, value))

    def grads(b, n, m, j, bits, tiling):
        rows = slice(m * tiling.query_tile, (m + 1) * tiling.query_tile)
        q, d_o = (_tile(x, b, n, m, tiling.query_tile) for x in (query, d_out))
        k, v = (_tile(x, b, n // group, j, tiling.key_tile) for x in (key, value))
        logits = _logits(plan.scores, q @ k.T)
        mask = _mask(plan, tiling, tables, b, m, j, bits)
        weights = np.where(mask, np.exp(logits - lse[b, n, rows, None]), 0)
        d_weights = weights * (d_o @ v.T - shift[b, n, rows, None])
        return weights, np.where(mask, d_weights * _slope(plan.scores, logits), 0), q, k, d_o

    lists, tiling = tables.d_query, plan.d_query
    patterns = lists.counts.shape[1]
    for b, n, m in np.ndindex(batch, heads, length // tiling.query_tile):
        for j, bits in _entries(lists, b, n * patterns // heads, m):
            _, d_raw, _, k, _ = grads(b, n, m, j, bits, tiling)
            d_query[b, m * tiling.query_tile : (m + 1) * tiling.query_tile, n] += d_raw @ k
    lists, tiling = tables.d_key, plan.d_key
    for b, n, j in np.ndindex(batch, heads, key.shape[1] // tiling.key_tile):
        columns = slice(j * tiling.key_tile, (j + 1) * tiling.key_tile)
        for m, bits in _entries(lists, b, n * patterns // heads, j):
            weights, d_raw, q, _, d_o = grads(b, n, m, j, bits, tiling)
            d_key[b, columns, n // group] += d_raw.T @ q
            d_value[b, columns, n // group] += weights.T @ d_o
    return d_query, d_key, d_value


def on_host(function, shapes):
    """Returns the loop as a function of traced arrays; shapes gives those it returns."""

    def call(plan, *arrays):
        expected = shapes(*arrays)

        def run(*arrays):
            with np.errstate(all="ignore"):
                wide = jax.tree.map(
                    lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, np.floating) else x,
                    jax.tree.map(np.asarray, arrays),
                )
                results = function(plan, *wide)
            return tuple(x.astype(y.dtype) for x, y in zip(results, expected, strict=True))

        return jax.pure_callback(run, expected, *arrays)

    return call
