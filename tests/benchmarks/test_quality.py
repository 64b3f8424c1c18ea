"""The quality table compares like with like."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax.training.state import ModelDef

FILE = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> Any:
    spec = importlib.util.spec_from_file_location("quality", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def num_parameters(config: Any) -> int:
    return sum(math.prod(p.shape) for p in ModelDef(config).params.values())


def test_all_models_have_the_same_number_of_parameters(quality: Any) -> None:
    configs = {name: quality.get_config(name) for name in quality.MODELS}
    for config in configs.values():
        config_lib.validate(config, num_devices=1)
    sizes = {name: num_parameters(config) for name, config in configs.items()}
    assert set(sizes.values()) == {sizes["dense"]}, sizes


def test_all_models_train_on_the_same_tokens_in_the_same_way(quality: Any) -> None:
    for name in quality.MODELS:
        changes = config_lib.diff(quality.get_config("dense"), quality.get_config(name))
        keys = {key for key in changes if not key.startswith("attention.")}
        assert keys <= {"model.mlp_dim"}, name
