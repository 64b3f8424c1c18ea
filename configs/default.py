"""The default configuration; sparseformer_jax/default_config.py documents every key.

It lives in the package so that an installed copy knows every key too.
"""

from sparseformer_jax.default_config import get_config as get_config
