"""Evaluates retrieval; `python -m sparseformer_jax.evaluation.retrieval --help` tells how."""

from sparseformer_jax import cli

if __name__ == "__main__":
    cli.retrieve()
