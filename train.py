"""Trains a sparse transformer from a config; `python train.py --help` tells how."""

from sparseformer_jax import cli

if __name__ == "__main__":
    cli.train()
