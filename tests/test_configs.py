"""Every config of the repository is valid, and trains at its tiny size."""

import re
from pathlib import Path

import jax
import pytest

from sparseformer_jax import command, config_flags, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import from_json, to_json, validate
from sparseformer_jax.training import loop
from sparseformer_jax.training.state import ModelDef

CONFIGS = Path(__file__).parents[1] / "configs"
OTHERS = ("default", "quickstart")
METHODS = [path.stem for path in CONFIGS.glob("*.py") if path.stem not in OTHERS]


def load(argument):
    return config_flags.load(str(CONFIGS / argument))


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_every_size_is_valid(method, size):
    config = load(f"{method}.py:{size}")
    validate(config, num_devices=8)
    assert to_json(from_json(to_json(config))) == to_json(config)
    assert method in (config.attention.name, config.sparsity.name)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_may_start_from_a_pretrained_model(method, tmp_path):
    other = load("dense.py:tiny")
    other.model.mlp, other.data.bos_token = "geglu_tanh", ""
    other.attention = registry.method_config("attention", "masformer", span="window", span_size=9)
    (tmp_path / "config.json").write_text(to_json(other))
    config = load(f"{method}.py:pretrained")
    with pytest.raises(ConfigError, match="init_settings=True: the settings of init_from"):
        validate(config, num_devices=1)
    with pytest.raises(ConfigError, match="init_from='': this config has the model of another"):
        command.inherit(config)
    config.init_from = f"{tmp_path}:7"
    assert command.inherit(config)
    assert not command.inherit(config)
    assert (config.model, config.data.bos_token) == (other.model, "")
    is_own = method in ("dense", *registry.names("sparsity"))
    assert config.attention.name == ("masformer" if is_own else method)
    if method == "seer":
        assert (config.attention.window_size, config.attention.window_layers) == (9, (1,))
    config.init_from = "absent"
    config.init_settings = True
    with pytest.raises(
        ConfigError,
        match=r"--config.init_from=absent: has no config.json; name the folder of a run$",
    ):
        command.inherit(config)


@pytest.mark.parametrize("name", ["s2", "masformer"])
def test_gates_learn_from_dense_attention_or_leave_windows(name, tmp_path):
    other = load("dense.py:tiny")
    other.attention = registry.method_config("attention", name)
    (tmp_path / "config.json").write_text(to_json(other))
    config = load("seer.py:pretrained")
    config.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match="^attention.name='seer': gates learn from .*; the run"):
        command.inherit(config)


@pytest.mark.parametrize(
    ("argument", "unit", "count"),
    [
        ("dense.py:tiny", 1e6, "0.1 M"),
        ("dense.py:small", 1e6, "124 M"),
        ("dense.py:paper", 1e9, "1.3 B"),
        ("combiner.py:small", 1e6, "124 M"),
        ("combiner.py:paper", 1e6, "111 M"),
        ("masformer.py:small", 1e6, "124 M"),
        ("masformer.py:paper", 1e9, "1.3 B"),
        ("routing.py:small", 1e6, "120 M"),
        ("routing.py:paper", 1e6, "164 M"),
        ("s2.py:small", 1e6, "124 M"),
        ("s2.py:paper", 1e9, "7.4 B"),
        ("seer.py:extend", 1e9, "8.1 B"),
    ],
)
def test_a_size_has_the_parameters_it_is_said_to_have(argument, unit, count):
    """With a vocabulary of its size: one of bytes leaves a third of them out."""
    name, size = argument.split(":")
    said = re.search(rf"^{size}: .*", (CONFIGS / name).read_text(), re.MULTILINE)
    assert count in said[0]
    parameters = sum(v.size for v in ModelDef(load(argument)).params.values())
    digits = len(count.split()[0].partition(".")[2])
    assert f"{parameters / unit:.{digits}f}" == count.split()[0]


@pytest.mark.parametrize(
    "method", ["s2", "masformer", "routing", "combiner", "dense", "pgf", "maskllm"]
)
def test_quickstart_is_valid_on_one_device(method):
    config = load(f"quickstart.py:{method}")
    validate(config, num_devices=1)
    assert method in (config.attention.name, config.sparsity.name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.representative("dense")  # tests/training trains the others
def test_tiny_trains_two_steps(method, tmp_path, capsys):
    config = load(f"{method}.py:tiny")
    config.train.num_steps = 2
    config.optimizer.warmup_steps = 1
    if method == "pgf":
        config.sparsity.dense_steps, config.sparsity.decay_steps = 0, 1
    config.train.batch_size = jax.device_count()
    config.eval.num_batches = 1
    config.eval.plots = False
    validate(config)
    loop.train(config, tmp_path)
    assert "step 2/2" in capsys.readouterr().out
