"""What gates of blocks cost, and what they learn from."""

from sparseformer_jax.attention._gates import GateOptions
from sparseformer_jax.model.config import ModelConfig


def gate_flops(
    options: GateOptions, config: ModelConfig, seq_len: int, *, is_training: bool
) -> float:
    """Returns FLOPs a token of a gate's projections and scores, 2 for each product.

    Their backward pass has a product for each weight, none for queries and keys, and one for
    each side of the scores that has weights.
    """
    dim, head_dim = options.dim(config), config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    blocks = -(-seq_len // options.block_size)
    is_prefill, projection = options.gates == "prefill", options.query_projection
    rows = blocks if is_prefill else seq_len
    of_query = {
        "none": 0,
        "head": heads * len(options.query_pools),
        "group": heads,
        "average": kv_heads,
    }[projection]
    of_key = heads if is_prefill and projection == "none" else kv_heads
    projections = (rows * of_query + blocks * of_key * len(options.key_pools)) * head_dim * dim
    scores = rows * blocks * dim * (heads if is_prefill else kv_heads)
    if is_training:
        sides = 1 + (projection != "none" or options.gate_norm)
        projections, scores = 2 * projections, (1 + sides) * scores
    return 2 * (projections + scores) / seq_len


def target_flops(config: ModelConfig, seq_len: int, *, has_lse: bool) -> float:
    """Returns FLOPs a token of a product of all queries and the keys before them.

    Without the log-sum-exp of dense attention, that comes first: two more such products.
    """
    products = 1 if has_lse else 3
    return products * 2 * config.num_heads * config.head_dim * (seq_len + 1) / 2
