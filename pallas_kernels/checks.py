"""The check of queries and keys that every operation makes."""

from jaxtyping import Array


def check_heads(query: Array, key: Array) -> None:
    """Raises ValueError unless query [B, T, N, H] and key [B, S, K, H] fit together."""
    for name, array in {"query": query, "key": key}.items():
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}: pass [batch, length, heads, head_dim]"
            )
    batch, _, num_heads, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or num_heads % key.shape[2]:
        raise ValueError(
            f"key has shape {key.shape}, query {query.shape}: pass equal batch and "
            "head_dim, and key heads that divide the query heads"
        )
