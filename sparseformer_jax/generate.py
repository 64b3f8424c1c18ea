"""Samples text from a trained model; `python -m sparseformer_jax.generate --help` tells how."""

from sparseformer_jax import cli

if __name__ == "__main__":
    cli.sample()
