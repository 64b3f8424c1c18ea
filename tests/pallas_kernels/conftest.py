from collections.abc import Iterator

import jax
import jaxtyping
import pytest


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the checks of types and shapes that only tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Fails where an interpreter of kernels tells of a race, which it prints."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For programs that are large and run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
