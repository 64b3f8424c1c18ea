"""Samples text from a trained model, token by token.

Every token runs the model over one window of fixed length, as in training: exact for every
attention method, compiled once, meant for looking at a model rather than for serving one.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.generation.text_stream import TextStream
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef, TrainState


def stream(
    config: ConfigDict,
    workdir: Path,
    prompt: str,
    *,
    num_tokens: int = 256,
    temperature: float = 0.8,
    seed: int = 0,
    step: int | None = None,
) -> Iterator[str]:
    """Yields the continuation of a prompt, each piece as soon as its characters are complete.

    It ends with the document, or after `num_tokens`.

    Args:
      config: the run's.
      workdir: of the run.
      prompt: text to continue; its last tokens count if it exceeds `data.seq_len`.
      num_tokens: how many to sample at most.
      temperature: of the softmax, 0.001 to 1000; 0 takes the likeliest token.
      seed: of the sampling, below 2**32.
      step: which checkpoint; None: the newest.

    Raises:
      ConfigError: the model is not causal, there is no such checkpoint, or an argument is
        out of its range.
    """
    _check(config, temperature, seed)
    tokenizer = make_tokenizer(config)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = start + tokenizer.encode(_utf8(prompt)).tolist()
    if not tokens:
        raise ConfigError("--prompt is empty and the tokenizer has no beginning of document")
    text = TextStream(tokenizer.decode, tokens[len(start) :])
    sampler = Sampler(config, workdir, step, temperature, seed, tokenizer.vocab_size)

    def pieces() -> Iterator[str]:
        for token in itertools.islice(sampler.continuation(tokens), num_tokens):
            if token == tokenizer.eos_id:
                break
            yield text.push(token)
        yield text.rest()

    return pieces()


def generate(config: ConfigDict, workdir: Path, prompt: str, **options: Any) -> str:
    """Returns the prompt and its continuation; arguments and errors are those of `stream`."""
    return prompt + "".join(stream(config, workdir, prompt, **options))


class Sampler:
    """Draws tokens from the model of a checkpoint, on one device.

    Args:
      config: the run's.
      workdir: of the run.
      step: which checkpoint; None: the newest.
      temperature: of the softmax; 0 takes the likeliest token.
      seed: of the draws.
      vocab_size: of the tokenizer; rows beyond, which pad a vocabulary, are never drawn.

    Raises:
      ConfigError: there is no such checkpoint, or it does not fit the config.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        step: int | None,
        temperature: float,
        seed: int,
        vocab_size: int,
    ) -> None:
        self._mesh = mesh.make_mesh({}, jax.devices()[:1])
        self._window = np.zeros((1, config.data.seq_len), np.int32)
        with jax.set_mesh(self._mesh):
            model_def = ModelDef(config)
            self._state = restore_state(model_def, workdir, step)
            self._key = jax.random.key(seed)

        def draw(
            state: TrainState,
            window: Int[Array, "1 T"],
            last: Int[Array, ""],
            key: Key[Array, ""],
            index: Int[Array, ""],
        ) -> Int[Array, ""]:
            """Draws the token after position `last`: a causal model sees nothing later."""
            model = model_def.model(state.params, state.variables, state.step)
            hidden = jax.lax.dynamic_slice_in_dim(model.features(window).hidden, last, 1, axis=1)
            logits = model.logits(hidden, model.output_kernel())[0, 0, :vocab_size]
            if temperature == 0:
                return jnp.argmax(logits)
            # The largest is 0 before the division, so that none overflows.
            scaled = (logits - jnp.max(logits)) / temperature
            return jax.random.categorical(jax.random.fold_in(key, index), scaled)

        self._draw = jax.jit(draw)

    def continuation(self, tokens: Sequence[int]) -> Iterator[int]:
        """Yields tokens without end; the last `data.seq_len` of all before decide the next."""
        recent = collections.deque(tokens, maxlen=self._window.size)
        for index in itertools.count():
            self._window[0, : len(recent)] = recent
            # Only here: a generator must not leave its mesh to its caller.
            with jax.set_mesh(self._mesh):
                drawn = self._draw(self._state, self._window, len(recent) - 1, self._key, index)
                token = int(drawn)
            recent.append(token)
            yield token


def _check(config: ConfigDict, temperature: float, seed: int) -> None:
    if not config.model.is_causal:
        raise ConfigError("model.is_causal=False: an encoder does not predict the next token")
    if temperature != 0 and not 1e-3 <= temperature <= 1e3:
        raise ConfigError(
            f"--temperature={temperature}: must be from 0.001 to 1000, or 0 for the likeliest"
        )
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed={seed}: must be from 0 to below 2**32")


def _utf8(prompt: str) -> str:
    """Returns the prompt, whose bytes that were no UTF-8 Python keeps as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"--prompt={prompt!a}: not UTF-8 at character {error.start}; convert it"
        ) from None
    return prompt
