"""Samples text from a trained model.

    python -m sparseformer_jax.generate --workdir=/tmp/quickstart --prompt="def "

Every token runs the model over the whole window, as in training: exact for every
attention method, meant for looking at a model rather than for serving one.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key
from ml_collections import ConfigDict

from sparseformer_jax import mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.restore import restore_params
from sparseformer_jax.training.state import ModelDef, Params


@functools.partial(jax.jit, static_argnums=0, static_argnames="temperature")
def _next_token(
    model_def: ModelDef,
    params: Params,
    window: Int[Array, "1 T"],
    last: Int[Array, ""],
    key: Key[Array, ""],
    *,
    temperature: float,
) -> Int[Array, ""]:
    """Draws the token after position `last`; what stands later in the window is unseen."""
    logits = model_def.merge(params)(window).logits[0, last]
    if temperature == 0:
        return jnp.argmax(logits)
    return jax.random.categorical(key, logits / temperature)


def generate(
    config: ConfigDict,
    workdir: Path,
    prompt: str,
    *,
    num_tokens: int = 256,
    temperature: float = 0.8,
    seed: int = 0,
    step: int | None = None,
) -> str:
    """Returns the prompt and up to `num_tokens` sampled tokens, to the end of the document.

    Args:
      config: the run's.
      workdir: of the run.
      prompt: text to continue; its last tokens count if it exceeds `data.seq_len`.
      num_tokens: how many to sample at most.
      temperature: of the softmax; 0 takes the likeliest token.
      seed: of the sampling.
      step: which checkpoint; None: the newest.

    Raises:
      ValueError: the model is not causal, or there is no such checkpoint.
    """
    if not config.model.is_causal:
        raise ConfigError("model.is_causal=False: an encoder does not predict the next token")
    tokenizer = make_tokenizer(config)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = start + tokenizer.encode(prompt).tolist()
    if not tokens:
        raise ConfigError("--prompt is empty and the tokenizer has no beginning of document")
    size = config.data.seq_len
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        _, params = restore_params(model_def, workdir, step)
        for key in jax.random.split(jax.random.key(seed), num_tokens):
            recent = tokens[-size:]
            window = jnp.zeros((1, size), jnp.int32).at[0, : len(recent)].set(jnp.array(recent))
            token = int(
                _next_token(
                    model_def, params, window, len(recent) - 1, key, temperature=temperature
                )
            )
            if token == tokenizer.eos_id:
                break
            tokens.append(token)
    return tokenizer.decode(tokens[len(start) :])


if __name__ == "__main__":
    from sparseformer_jax import cli

    cli.sample()
