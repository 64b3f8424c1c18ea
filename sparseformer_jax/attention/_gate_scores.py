"""What a gate says of a layer's queries, documents kept apart."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparseformer_jax.attention import _gates, _pooled_blocks
from sparseformer_jax.attention._gates import BlockGate, GateOptions, pool
from sparseformer_jax.attention.inputs import Inputs, Shard
from sparseformer_jax.checks import ConfigError


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of local rows, blocks of queries or single ones.

    Attributes:
      scores: [B, n, M, J].
      past: whole blocks before the row's own, of its document.
      own: which block is the row's.
      is_kept: which queries the rows speak of.
      num_blocks: of each sequence, up to its last token; None: J.
    """

    scores: Float[Array, "B n M J"]
    past: Bool[Array, "b 1 M J"]
    own: Bool[Array, "c 1 M J"]
    is_kept: Bool[Array, "B T"]
    num_blocks: Int[Array, " B"] | None = None


def scored_by(gate: BlockGate, inputs: Inputs, shard: Shard) -> Scored:
    """Returns the scores of blocks of keys; through them no gradient reaches the model.

    Raises:
      ConfigError: devices cut blocks of queries.
    """
    options = gate.options
    size = options.block_size
    query, key = jax.lax.stop_gradient((inputs.unrotated_query, inputs.unrotated_key))
    of_query, of_key = inputs.segment_ids or (None, None)
    query_positions, key_positions = inputs.positions
    places = shard.query_offset + jnp.arange(query.shape[1])
    blocks = _pooled_blocks.pooled(key, key_positions, of_key, size, options.key_pools, "last")
    keys = gate.keys(blocks.vectors, blocks.positions)
    if options.gates == "decode":
        queries, documents = gate.queries(query, query_positions), of_query
        is_kept, own = jnp.ones(query.shape[:2], bool), places // size
    else:
        _check_whole_blocks(size, query.shape[1], shard)
        pools = options.query_pools
        rows = _pooled_blocks.pooled(query, query_positions, of_query, size, pools, "first")
        queries, documents = gate.queries(rows.vectors, rows.positions), rows.documents
        is_kept, own = rows.is_kept, places[::size] // size
    scores = _gates.scores(queries, keys)
    if options.gates == "prefill" and of_key is not None:
        # A row's own block is to its first document what no other row sees of it.
        pools = options.key_pools
        blocks_of_first = _pooled_blocks.pooled(key, key_positions, of_key, size, pools, "first")
        keys = gate.keys(blocks_of_first.vectors, blocks_of_first.positions)[:, own]
        scores = _with_own(scores, queries, keys, own)
    block = jnp.arange(scores.shape[-1])
    past = (block < own[:, None])[None, None]
    if documents is not None and blocks.documents is not None:
        past = past & (documents[:, :, None] == blocks.documents[:, None])[:, None]
    return Scored(scores, past, (block == own[:, None])[None, None], is_kept)


def mean_pooled(options: GateOptions, inputs: Inputs) -> Float[Array, "B n M J"]:
    """Returns products of average keys and queries after their rotation, which learn nothing.

    As in MoBA, Lu et al. 2025, arXiv 2502.13189, section 2.2; here a document starts with a block.

    Args:
      options: of the rows, blocks of queries or single ones; those average over their group.
      inputs: of the layer.
    """
    size, query, key = options.block_size, inputs.query, inputs.key

    def averages(x: jax.Array) -> jax.Array:
        return pool(x, size, ("avg",), jnp.ones(x.shape[:2], bool))

    if options.gates == "prefill":
        return _gates.scores(averages(query), averages(key))
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    return _gates.scores(jnp.mean(grouped, axis=3), averages(key))


def _with_own(scores: jax.Array, queries: jax.Array, keys: jax.Array, own: jax.Array) -> jax.Array:
    """The scores, with those of each row's own block by keys made for the row [B, M, k, D]."""
    pairs = jax.vmap(_gates.scores, (1, 1), 2)(queries[:, :, None], keys[:, :, None])
    is_own = own[:, None] == jnp.arange(scores.shape[-1])
    return jnp.where(is_own, pairs[..., 0], scores)


def _check_whole_blocks(size: int, num_queries: int, shard: Shard) -> None:
    if shard.seq_axes and num_queries % size:
        raise ConfigError(
            f"mesh.context leaves {num_queries} queries to a device, which blocks of {size} "
            "tokens do not divide; take fewer devices or smaller blocks"
        )
