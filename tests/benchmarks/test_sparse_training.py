"""Runs of sparse weights cost the FLOPs of the dense run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from sparseformer_jax import config as config_lib

FILE = Path(__file__).parents[2] / "benchmarks" / "sparse_training.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("sparse_training", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", ["sr_ste,2:4,scaled", "mdgf_linear,1:8,straight_through", "sdgf_geometric,1:8,scaled"]
)
def test_a_run_costs_what_the_dense_one_does(benchmark: Any, name: str) -> None:
    config = benchmark.get_config(name)
    config_lib.validate(config, num_devices=1)
    ratio = benchmark.flops(config) / benchmark.flops(benchmark.get_config("dense"))
    # By a step more or less, where phases are a tenth of the steps, cut to whole ones.
    assert ratio == pytest.approx(1, abs=2 / config.train.num_steps)
    assert config.train.num_steps >= benchmark.DENSE_STEPS
