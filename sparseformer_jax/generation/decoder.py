"""Continues sequences of tokens: reads the prompts at once, then writes token by token."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from sparseformer_jax import mesh
from sparseformer_jax.checks import NonFiniteError
from sparseformer_jax.training.state import ModelDef, TrainState

_SHORTEST = 16  # prompts are read in windows of powers of two, from this on: few compilations

NextToken = Callable[[jax.Array, Key[Array, ""]], Int[Array, ""]]


class Decoder:
    """A model that reads tokens once, and keeps of them what its attention needs.

    Where a sequence has grown to `size` its first half is forgotten, and the rest read anew.

    Args:
      model_def: the model.
      state: its parameters and variables, on the current mesh.
      size: most tokens of a sequence that decide the next one.
      choose: a token by logits [V] and a key.
      vocab_size: of the tokenizer; rows beyond, which pad a vocabulary, are never chosen.
    """

    def __init__(
        self,
        model_def: ModelDef,
        state: TrainState,
        *,
        size: int,
        choose: NextToken,
        vocab_size: int,
    ) -> None:
        self._model_def, self._state, self.size = model_def, state, size
        self._mesh = jax.sharding.get_mesh()

        def advance(
            state: TrainState,
            tokens: Int[Array, "B T"],
            start: Int[Array, " B"],
            last: Int[Array, " B"],
            cache: Any,
            key: Key[Array, ""],
            index: Int[Array, ""],
        ) -> tuple[Int[Array, " B"], Bool[Array, ""], Any]:
            """Reads tokens, of which row b's `last[b]` is the last, and chooses the next.

            Beside it and the cache: whether every logit is a finite number.
            """
            model = model_def.model(state.params, state.variables, state.step)
            hidden, cache = model.decode(tokens, start, cache, last + 1)
            rows = jnp.arange(len(tokens))
            ends = hidden.at[rows, last].get(out_sharding=mesh.spec("batch", None))
            logits = model.logits(ends[:, None], model.output_kernel())[:, 0, :vocab_size]
            logits = mesh.shard(logits, "batch", None)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.fold_in(key, index), mesh.shard(rows, "batch")
            )
            return jax.vmap(choose)(logits, keys), jnp.all(jnp.isfinite(logits)), cache

        # The cache is changed in place.
        self._advance: Any = jax.jit(advance, donate_argnums=4)

    def continuations(
        self, prompts: Sequence[Sequence[int]], key: Key[Array, ""]
    ) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields the next token of every sequence, without end.

        A sequence's tokens do not depend on the others. Its key is folded with its number and
        with how many were chosen.

        Args:
          prompts: of at least a token each; their last `size` count.
          key: of the draws.

        Raises:
          NonFiniteError: a logit is not a finite number.
        """
        texts = [list(prompt)[-self.size :] for prompt in prompts]
        index = 0
        while True:
            chosen, cache = self._read(texts, key, index)
            while True:
                index += 1
                yield chosen
                for text, token in zip(texts, chosen, strict=True):
                    text.append(int(token))
                if max(map(len, texts)) > self.size:
                    break
                start = np.asarray([len(text) - 1 for text in texts], np.int32)
                last = np.zeros_like(start)
                chosen, cache = self._run(chosen[:, None], start, last, cache, key, index)
            texts = [
                text[-(self.size // 2 or 1) :] if len(text) > self.size else text for text in texts
            ]

    def _read(
        self, texts: Sequence[Sequence[int]], key: Key[Array, ""], index: int
    ) -> tuple[Int[np.ndarray, " B"], Any]:
        """Reads whole sequences into an empty cache."""
        ends = np.asarray([len(text) for text in texts], np.int32)
        width = _SHORTEST
        while width < ends.max():
            width *= 2
        tokens = np.zeros((len(texts), min(width, self.size)), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = text
        with jax.set_mesh(self._mesh):
            model = self._model_def.model(self._state.params, self._state.variables, 0)
            cache = model.init_cache(len(texts), self.size)
        return self._run(tokens, np.zeros_like(ends), ends - 1, cache, key, index)

    def _run(
        self, tokens: Any, start: Any, last: Any, cache: Any, key: Any, index: int
    ) -> tuple[Int[np.ndarray, " B"], Any]:
        # Only here: a generator must not leave its mesh to its caller.
        with jax.set_mesh(self._mesh):
            *found, cache = self._advance(self._state, tokens, start, last, cache, key, index)
            chosen, is_finite = jax.device_get(found)
        if not is_finite:
            raise NonFiniteError(
                f"logits of token {index} are not finite: these parameters predict nothing; take "
                "an earlier checkpoint with --step"
            )
        return chosen, cache
