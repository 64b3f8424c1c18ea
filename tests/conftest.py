"""Settings of the whole suite: eight simulated CPU devices, no network, no skips."""

import importlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

# Before JAX is imported: it reads the variables once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests run once or twice: compiling them well would take longer than that.
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
# Workers and the processes that tests start inherit the folder, and compile nothing twice.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="xla-cache-")

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
# Libraries read absl's flags, which nothing parses here.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data goes to a folder of this run, never to the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def add_attention(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], None]]:
    """A function (name, source) that adds an attention method for one test."""
    package = importlib.import_module("sparseformer_jax.attention")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    added = []

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"sparseformer_jax.attention.{name}", None)
        vars(package).pop(name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compilation cache at the end of the process that leads the others."""
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if not hasattr(config, "workerinput") and "xla-cache-" in folder:
        shutil.rmtree(folder, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test counts as failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    return _fail_if_skipped(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    return _fail_if_skipped(collector.config, (yield))


def _fail_if_skipped(config, report):
    expected = hasattr(report, "wasxfail")
    if report.skipped and not expected and config.getoption("--no-skips"):
        report.outcome = "failed"
    return report
