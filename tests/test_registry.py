"""Methods are found by name, their options are checked and become config sections."""

import pytest
from ml_collections import ConfigDict

from sparseformer_jax import registry
from sparseformer_jax.checks import ConfigError

TOY = '''
"""A method for tests."""
import dataclasses
from typing import Literal

@dataclasses.dataclass(frozen=True)
class Options:
    window_size: int = 4
    rate: float = 0.5
    scale: float | None = None
    layers: tuple[int, ...] = (0, 2)
    mode: str = "full"
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size={self.window_size}: must be positive")
'''


@pytest.fixture
def toy(add_attention) -> None:
    add_attention("toy", TOY)


def test_names_are_the_modules_of_the_folder(toy, add_attention):
    add_attention("_private", "")
    found = registry.names("attention")
    assert {"dense", "toy"} <= set(found)
    assert not {"base", "_private"} & set(found)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="kind of method='atention'.*did you mean attention"):
        registry.names("atention")


def test_method_is_the_module(toy):
    assert registry.method("attention", "toy").__name__.endswith("attention.toy")


def test_unknown_method_is_refused_with_the_nearest(toy):
    with pytest.raises(ConfigError, match=r"attention\.name='tyo'.*did you mean toy"):
        registry.method("attention", "tyo")


def test_every_default_is_in_the_config_section(toy):
    section = registry.method_config("attention", "toy", rate=1)
    assert section.to_dict() == {
        "name": "toy",
        "window_size": 4,
        "rate": 1.0,
        "scale": None,
        "layers": (0, 2),
        "mode": "full",
        "pooling": "max",
    }
    section.scale = 0.25
    assert registry.options("attention", section).scale == 0.25


def test_left_out_options_keep_their_defaults(toy):
    options = registry.options("attention", ConfigDict({"name": "toy", "rate": 1}))
    assert options.window_size == 4
    assert options.rate == 1.0
    assert isinstance(options.rate, float)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"window": 8}, r"^attention\.window=8: .*toy; did you mean window_size\?$"),
        ({"window_size": 8.0}, r"^attention\.window_size=8\.0: must be int, not float"),
        ({"window_size": True}, r"^attention\.window_size=True: must be int, not bool"),
        ({"window_size": 0}, r"^attention\.window_size=0: must be positive$"),
        ({"rate": None}, r"^attention\.rate=None: must be float"),
        (
            {"pooling": "man"},
            r"^attention\.pooling='man': not one of max, mean; did you mean mean\?$",
        ),
        ({"scale": "x"}, r"^attention\.scale='x': must be float \| None"),
        (
            {"layers": ("x",)},
            r"^attention\.layers=\('x',\): must be tuple\[int, \.\.\.\]",
        ),
    ],
)
def test_wrong_options_are_refused(toy, option, message):
    with pytest.raises(ConfigError, match=message):
        registry.method_config("attention", "toy", **option)


def test_lists_become_tuples(toy):
    section = registry.method_config("attention", "toy", layers=[1, 3])
    assert section.layers == (1, 3)
