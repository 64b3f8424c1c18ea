"""State changed inside a module does not pass for learned: it raises, naming the variable."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparseformer_jax import mesh
from sparseformer_jax.attention import dense
from sparseformer_jax.model.read_only import read_only
from sparseformer_jax.model.transformer import Transformer
from tests.model.harness import place, put, small_config


class Counting(dense.Method):
    """Counts in a variable of its own how often it attended."""

    def __init__(self, config, options, *, rngs):
        super().__init__(config, options, rngs=rngs)
        self.count = nnx.BatchStat(jnp.zeros(()), axes=())

    def attend(self, *arguments):
        attended = super().attend(*arguments)
        self.count[...] += 1
        return dataclasses.replace(attended, diagnostics={"count": self.count[...]})


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_variable_changed_in_attend_is_named(remat, sizes):
    """Under scan, under remat, and where attention runs in `shard_map`."""
    config = small_config(remat=remat, embed_dim=16, vocab_size=40)
    model = Transformer(config, Counting, dense.Options(), rngs=nnx.Rngs(0))
    tokens = jnp.zeros((8, 4), jnp.int32)

    def loss(model, tokens):
        return jnp.sum(model(tokens).logits)

    with contextlib.ExitStack() as stack:
        if sizes is not None:
            stack.enter_context(jax.set_mesh(mesh.make_mesh(sizes)))
            model, tokens = place(model), put(tokens, "batch", "seq")
        with pytest.raises(RuntimeError, match=r"\bcount: changed during") as error:
            jax.eval_shape(nnx.grad(loss), model, tokens)
    assert "\n" not in str(error.value)


def test_variables_that_are_added_or_replaced_are_named():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with read_only(module):
        module(jnp.ones(2))

    def change():
        with read_only(module):
            module.kernel[...] = 2 * module.kernel[...]
            module.cache = nnx.Variable(jnp.ones(2))

    with pytest.raises(RuntimeError, match="^cache, kernel: changed"):
        change()
