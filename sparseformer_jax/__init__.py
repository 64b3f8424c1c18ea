"""Train sparse transformers in JAX: learned sparse attention and weights, one exact trainer."""
