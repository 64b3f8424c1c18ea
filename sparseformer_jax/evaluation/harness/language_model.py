"""A checkpoint as a model of lm-evaluation-harness, which this file needs.

What is asked is encoded and cut as by the `HFLM` there, whose published figures it stands beside.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from ml_collections import ConfigDict
from tqdm import tqdm

from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.harness.generation import Generation
from sparseformer_jax.evaluation.scoring import Scorer, Window
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.sampling import Sampler

_SHORTEST = 16  # rows are as wide as a power of two, from this on: few compilations


class CheckpointLM(TemplateLM):
    """The model of a checkpoint, which sees `data.seq_len` tokens at most.

    Of longer inputs the last tokens count. `eval.batch_size` are computed at a time.

    Args:
      config: of the run.
      workdir: of the run.
      step: which checkpoint; None: the newest.

    Attributes:
      max_length: tokens that it sees.
      step: of the checkpoint, once something was asked.

    Raises:
      ConfigError: the model is not causal, or a request asks for what it cannot do; and what
        `Scorer` and `Sampler` raise.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int | None = None) -> None:
        super().__init__()
        if not config.model.is_causal:
            raise ConfigError("model.is_causal=False: an encoder does not predict the next token")
        self._config, self._workdir, self.step = config, workdir, step
        self._tokens = make_tokenizer(config)
        self._loaded: Scorer | Sampler | None = None
        self.max_length: int = config.data.seq_len

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a document."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: of the begin, or of the end."""
        for number in (self._tokens.bos_id, self._tokens.eos_id):
            if number is not None:
                return number
        raise ConfigError(
            "data.bos_token='': a text without context needs a token before it; set "
            "--config.data.bos_token or --config.data.eos_token"
        )

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in caches of requests."""
        return self._tokens.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Returns tokens, the first of a document before them.

        It is added where `data.bos_token` names one, unless the text begins with it or
        `add_special_tokens` is False.
        """
        ids = self._tokens.encode(string).tolist()
        bos = [] if self._tokens.bos_id is None else [self._tokens.bos_id]
        return ids if add_special_tokens is False or ids[:1] == bos else bos + ids

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns ln p of each continuation, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        scores = self._load(Scorer)(windows, self._width)
        answers = [
            (-float(nll), bool(is_greedy))
            for nll, is_greedy in zip(scores.nll, scores.is_greedy, strict=True)
        ]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns ln p of each text, every token of which is predicted once.

        In windows of at most `data.seq_len`, the last one as full as the others.
        """
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            pieces = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            own = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += own
            counts.append(len(own))
        values = (value for value, _ in self._loglikelihood_tokens(windows))
        sums = [sum(itertools.islice(values, count), 0.0) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy continuation of each context, up to any of its stop strings."""
        asked = [request.args for request in requests]
        by_settings: dict[Generation, list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            by_settings.setdefault(Generation.parse(settings), []).append(number)
        answers = [""] * len(asked)
        show = {"unit": "prompt", "leave": False, "disable": disable_tqdm or None}
        with tqdm(total=len(asked), desc="generate", **show) as bar:
            for settings, numbers in by_settings.items():
                prompts = {n: self._prompt(asked[n][0], settings.max_tokens) for n in numbers}
                # The longest first: prompts of about one length are read together.
                numbers.sort(key=lambda n: len(prompts[n]), reverse=True)
                size = min(self._config.eval.batch_size, len(numbers))
                for first in range(0, len(numbers), size):
                    batch = numbers[first : first + size]
                    texts = self._continued([prompts[n] for n in batch], size, settings)
                    for number, text in zip(batch, texts, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", asked[number], text)
                    bar.update(len(batch))
        return answers

    def _continued(self, prompts: list[list[int]], size: int, settings: Generation) -> list[str]:
        """Continuations, computed in a batch of one size: what fills it up, nobody reads."""
        filled = prompts + prompts[:1] * (size - len(prompts))
        texts = self._load(Sampler).continued(filled, settings.max_tokens, settings.until)
        return texts[: len(prompts)]

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        room = self.max_length - max_tokens
        if room < 1:
            raise ConfigError(
                f"max_gen_toks={max_tokens}: the model sees {self.max_length} tokens, prompt and "
                f"answer together; pass --config.data.seq_len={max_tokens + self.max_length}, or "
                "--gen_kwargs=max_gen_toks=... with fewer"
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        count = len(continuation)
        if not 1 <= count <= self.max_length:
            raise ConfigError(
                f"a continuation of {count} tokens after {len(context)}: the model predicts from 1 "
                f"to --config.data.seq_len={self.max_length}"
            )
        tokens = [*context, *continuation][-self.max_length - 1 :]
        return Window(np.array(tokens), len(tokens) - count)

    def _width(self, num_inputs: int) -> int:
        width = _SHORTEST
        while width < num_inputs:
            width *= 2
        return min(width, self.max_length)

    def _load(self, kind: Any) -> Any:
        """The checkpoint as a scorer or a sampler; memory holds one of them."""
        if not isinstance(self._loaded, kind):
            self._loaded = None
            options: Mapping[str, Any] = {"choice": Choice(0.0)} if kind is Sampler else {}
            self._loaded = kind(self._config, self._workdir, step=self.step, **options)
            self.step = self._loaded.step
        return self._loaded
