"""What tasks ask of generation, and mistakes of the command, without the harness itself."""

import sys

import pytest

from sparseformer_jax import default_config
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.config import to_json
from sparseformer_jax.evaluation.harness.__main__ import main
from sparseformer_jax.evaluation.harness.generation import Generation


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Generation((), 256)),
        ({"until": "\n", "max_new_tokens": 5, "num_beams": 1}, Generation(("\n",), 5)),
        ({"until": ["a", ""], "do_sample": False, "temperature": 0.7}, Generation(("a",), 256)),
        ({"max_tokens": 7, "max_gen_toks": 9, "do_sample": None}, Generation((), 9)),
    ],
)
def test_greedy_generation_is_understood(settings, expected):
    assert Generation.parse(settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "do_sample=True temperature=0.7: only greedy"),
        ({"do_sample": True}, "only greedy decoding is supported; pass --gen_kwargs=do_sample"),
        ({"num_beams": 4}, "num_beams=4: not supported; known are until"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be at least 1"),
    ],
)
def test_anything_else_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Generation.parse(settings)


def test_mistakes_of_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(to_json(default_config.get_config()))
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    def mistake(*flags):
        with pytest.raises(SystemExit) as stopped:
            main(["harness", *flags])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    workdir = f"--workdir={tmp_path}"
    assert mistake("--tasks=a") == (
        "error: --workdir=...: missing; the folder that training or an import wrote\n"
    )
    assert mistake(workdir).startswith("error: --tasks=...: missing; the names of tasks")
    assert mistake(workdir, "--tasks=a", "--limit=0").startswith("error: --limit=0: must be above")
    assert "did you mean --tasks?" in mistake(workdir, "--task=a")
    assert mistake(workdir, "--tasks=a") == (
        'error: this needs the package lm_eval: pip install "sparseformer_jax[lm_eval]"\n'
    )
