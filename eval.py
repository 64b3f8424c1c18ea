"""Evaluates a checkpoint of train.py; `python eval.py --help` tells how."""

from sparseformer_jax import cli

if __name__ == "__main__":
    cli.evaluate()
