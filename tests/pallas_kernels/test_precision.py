"""float32 products ask for float32, which a CPU would compute anyway."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import BlockMask, Local, block_max_attention, block_sparse_attention, targets
from pallas_kernels.targets import Target


def attention(implementation, *arrays):
    block_mask = BlockMask.from_rule(Local(64), 128, is_causal=True)
    attend = functools.partial(
        block_sparse_attention,
        block_mask=block_mask,
        is_causal=True,
        implementation=implementation,
    )
    out, pull = jax.vjp(attend, *arrays)
    return pull(out)


def maxima(implementation, query, key, _):
    return block_max_attention(
        *(query, key, jnp.zeros(query.shape[:3], jnp.float32)),
        query_block_size=64,
        key_block_size=64,
        is_causal=True,
        implementation=implementation,
    )


@pytest.mark.parametrize("function", [attention, maxima])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_not_rounded(function, implementation, dtype):
    arrays = [jnp.zeros((1, 128, 2, 64), dtype)] * 3
    with targets.use(Target("tpu", interpret=True)):
        program = str(jax.make_jaxpr(functools.partial(function, implementation))(*arrays))
    products = re.findall(r"dot_general\[.*?\]\s", program, re.DOTALL)
    exact = ["HIGHEST" in product for product in products]
    assert products
    assert all(exact) if dtype == "float32" else implementation == "reference" or not any(exact)
