"""Settings of the whole suite: eight simulated CPU devices, no network, no skips.

A machine that is lent for its accelerator may lack what only the suite or the trainer needs.
Without beartype shapes are not checked, without the trainer's data libraries only
tests/pallas_kernels is collected; the header says so, and `--no-skips` refuses both.
"""

import fnmatch
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

# Before JAX is imported: it reads the variables once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    # Programs of tests run once or twice: compiling them well would take longer than that.
    flags_of_xla = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Eight devices on few cores: collectives in one order, or they may never meet.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # Compiles in a quarter of the time. Later versions have the other emitters alone.
        flags_of_xla.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags_of_xla)
# Tests and the processes that they start compile nothing twice, however small it is.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"xla-cache-{os.getpid()}-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # A folder for each worker: JAX may read what another process has written half of.
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{os.environ['PYTEST_XDIST_WORKER']}"
# Every worker would take three quarters of the memory of the one GPU that all share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
# Libraries read absl's flags, which nothing parses here.
flags.FLAGS.mark_as_parsed()


def _missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


_KERNEL_TESTS = pathlib.Path(__file__).parent / "pallas_kernels"
_UNCHECKED = _missing("beartype")
_UNCOLLECTED = _missing("array_record", "grain", "ml_collections", "tensorflow_datasets")
if not _UNCHECKED:
    # Before the packages are imported: it rewrites them.
    jaxtyping.install_import_hook(["sparseformer_jax", "pallas_kernels"], "beartype.beartype")


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


def pytest_configure(config: pytest.Config) -> None:
    if (_UNCHECKED or _UNCOLLECTED) and config.getoption("--no-skips"):
        missing = ", ".join(_UNCHECKED + _UNCOLLECTED)
        raise pytest.UsageError(f"--no-skips: install what is missing: {missing}")
    if not _UNCHECKED:
        # flax annotates nnx.State with typing.Hashable.
        config.addinivalue_line(
            "filterwarnings",
            "ignore:.*typing.Hashable deprecated:"
            "beartype.roar.BeartypeDecorHintPep585DeprecationWarning",
        )


def pytest_report_header() -> list[str]:
    lines = []
    if _UNCHECKED:
        lines.append("shapes are not checked: beartype is not installed")
    if _UNCOLLECTED:
        lines.append(f"only {_KERNEL_TESTS.name}: {', '.join(_UNCOLLECTED)} not installed")
    return lines


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Leaves out what could not be imported: all but the kernels' tests, and folders above them."""
    is_kernels = collection_path.is_relative_to(_KERNEL_TESTS)
    is_above = _KERNEL_TESTS.is_relative_to(collection_path)
    return True if _UNCOLLECTED and not (is_kernels or is_above) else None


def pytest_collection_finish() -> None:
    """Has Python look for garbage among what tests make alone, and a tenth as often.

    Libraries and tests are a million objects that stay; programs are many that come and go.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Frees the programs of a file: a worker would keep gigabytes of them to its end."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as exhaustive what is not among the representatives of its test.

    `@pytest.mark.representative(*patterns)`: of a test's parameters, those whose id matches
    a pattern of `fnmatch` run in every run, the others only with `-m exhaustive`.
    """
    named: set[tuple[str, str]] = set()
    matched: set[tuple[str, str]] = set()
    for item in items:
        mark = item.get_closest_marker("representative")
        if mark is None:
            continue
        test = item.nodeid.split("[")[0]
        found = {p for p in mark.args if fnmatch.fnmatchcase(item.callspec.id, p)}
        matched |= {(test, pattern) for pattern in found}
        named |= {(test, pattern) for pattern in mark.args}
        if not found:
            item.add_marker(pytest.mark.exhaustive)
    is_whole = not any("::" in argument for argument in config.args)
    if is_whole and named - matched:
        raise pytest.UsageError(f"representatives that are no parameters: {named - matched}")


def pytest_unconfigure() -> None:
    """Removes the compilation cache at the end of the process that made it."""
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if f"xla-cache-{os.getpid()}-" in folder:
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
