"""Continues text with a trained model, token by token, as it would continue in training.

What came before is kept in a cache (`Attention.decode`), exact for every causal method.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data import Tokenizer
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.decoder import Decoder
from sparseformer_jax.generation.stops import StopText
from sparseformer_jax.generation.text_stream import TextStream
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef


class Sampler:
    """Continues texts with the model of a checkpoint.

    It runs on one device, or where `mesh.tensor` says more, on as many that share its heads.

    Args:
      config: the run's.
      workdir: of the run.
      step: which checkpoint; None: the newest.
      choice: of tokens.
      seed: of the draws, below 2**32.

    Attributes:
      tokenizer: of the run.
      step: of the checkpoint.

    Raises:
      ConfigError: the model is not causal, there is no such checkpoint, it does not fit the
        config, or the seed is out of its range.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        *,
        step: int | None = None,
        choice: Choice,
        seed: int = 0,
    ) -> None:
        if not config.model.is_causal:
            raise ConfigError("model.is_causal=False: an encoder does not predict the next token")
        if not 0 <= seed < 2**32:
            raise ConfigError(f"--seed={seed}: must be from 0 to below 2**32")
        self.tokenizer = make_tokenizer(config)
        num_devices = max(1, config.mesh.tensor)
        devices = jax.devices()[:num_devices]
        with jax.set_mesh(mesh.make_mesh({"tensor": num_devices}, devices)):
            model_def = ModelDef(config)
            # Masks are applied once, not for every token.
            model_def, state = model_def.hardened(restore_state(model_def, workdir, step))
            self.step = int(state.step)
            self._decoder = Decoder(
                model_def,
                state,
                size=config.data.seq_len,
                choose=choice,
                vocab_size=self.tokenizer.vocab_size,
            )
            self._key = jax.random.key(seed)

    def encode(self, prompt: str) -> list[int]:
        """Returns the tokens of a document that begins with the prompt.

        Raises:
          ConfigError: there are none.
        """
        start = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        tokens = start + self.tokenizer.encode(prompt).tolist()
        if not tokens:
            raise ConfigError("--prompt is empty and the tokenizer has no beginning of document")
        return tokens

    def stream(self, prompt: str, num_tokens: int, stop: Sequence[str] = ()) -> Iterator[str]:
        """Yields the continuation in pieces, each as soon as its characters are complete.

        It ends before a token that ends one, before the first of the strings `stop`, or after
        `num_tokens`.
        """
        tokens = self.encode(prompt)
        text = _Continuation(self.tokenizer, tokens, stop)
        for (token,) in itertools.islice(self.tokens([tokens]), num_tokens):
            yield text.push(token)
            if text.has_ended:
                break
        yield text.rest()

    def tokens(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Yields the next token of every sequence, without end."""
        for chosen in self._decoder.continuations(prompts, self._key):
            yield chosen.tolist()

    def continuations(
        self, prompts: Sequence[str], num_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Returns the continuation of each prompt, as `stream` yields it, written together."""
        return self.continued([self.encode(prompt) for prompt in prompts], num_tokens, stop)

    def continued(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Returns the continuation of each prompt of at least a token; see `continuations`."""
        texts = [_Continuation(self.tokenizer, prompt, stop) for prompt in prompts]
        written = [""] * len(texts)
        for chosen in itertools.islice(self.tokens(prompts), num_tokens):
            for row, (text, token) in enumerate(zip(texts, chosen, strict=True)):
                written[row] += "" if text.has_ended else text.push(token)
            if all(text.has_ended for text in texts):
                break
        return [start + text.rest() for start, text in zip(written, texts, strict=True)]


class _Continuation:
    """The text of tokens as they are chosen, until one of them or a string ends it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._stop_ids = tokenizer.stop_ids
        self._text, self._stop = TextStream(tokenizer.decode, prompt), StopText(stop)
        self.has_ended = False

    def push(self, token: int) -> str:
        """Returns the text that a token completes."""
        if token in self._stop_ids:
            self.has_ended = True
            return ""
        text = self._stop.push(self._text.push(token))
        self.has_ended = self._stop.is_complete
        return text

    def rest(self) -> str:
        """Returns what is left when no more tokens follow."""
        if self._stop.is_complete:
            return ""
        text = self._stop.push(self._text.rest())
        return text + self._stop.rest()


def generate(
    config: ConfigDict, workdir: Path, prompts: Sequence[str], num_tokens: int = 256, **options: Any
) -> list[str]:
    """Returns each prompt with its continuation; options and errors are those of `Sampler`."""
    sampler = Sampler(config, workdir, **{"choice": Choice()} | options)
    continued = sampler.continuations(prompts, num_tokens)
    return [prompt + text for prompt, text in zip(prompts, continued, strict=True)]
