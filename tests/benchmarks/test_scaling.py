"""The benchmark of length: what it fits, what it prints, and that all it times does the same."""

import importlib
import pathlib

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
NAMES = [
    "routing",
    "routing, paper",
    "combiner, fixed",
    "combiner, axial_row",
    "combiner, axial_mixture",
    "combiner, log_sparse",
    "dense",
    "jax.nn",
]


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scaling")


def test_every_name_is_tested(scaling):
    assert [*NAMES, "torch"] == list(scaling.scaling_passes.ATTENTION)


def test_the_exponent_is_that_of_the_power(scaling):
    lengths = [1024, 2048, 4096, 8192]
    times = [3e-4 * n**1.5 for n in lengths]
    assert scaling.exponent(lengths, times) == pytest.approx(1.5)
    bent = [*times[:3], 2 * times[2]]  # linear at last
    assert 1 < scaling.exponent(lengths[-2:], bent[-2:]) + 1e-9 < scaling.exponent(lengths, bent)


def test_tables_show_exponents_and_ratios(scaling):
    def row(method, length, ms):
        return {"method": method, "T": length, "ms": ms, "MiB": ms / 8, "wall": [ms, 2 * ms]}

    lengths = [1024, 2048, 4096, 8192]
    rows = [row("routing", n, n / 64) for n in lengths]
    rows += [row("jax.nn", n, n**2 / 2**20) for n in lengths]
    times, memory = scaling.time_table(rows), scaling.memory_table(rows)
    assert "| routing | 16 | 32 | 64 | 128 | 1.00 | 1.00 | 0.5x |" in times
    assert "| jax.nn | 0.125 | 0.5 | 2 | 8 | 2.00 | 2.00 |" in memory
    layers = [row("port", 1024, 30), row("ours", 1024, 20)]
    assert "| 1024 | 30 | 20 | 1.50x | 1.50x |" in scaling.layer_table(layers)


def test_a_slow_pass_runs_once_and_a_quick_one_in_every_round(scaling, monkeypatch):
    seconds = {"slow": 9, "quick": 0.06}
    runs = []
    monkeypatch.setattr(scaling, "timed", lambda run, repeats: (seconds[run(repeats)], 1))

    def make(name):
        return scaling.Pass(lambda repeats: runs.append((name, repeats)) or name)

    found = scaling.samples({name: make(name) for name in seconds}, 2, "test")
    assert {name: [x.wall for x in samples] for name, samples in found.items()} == {
        "slow": [9000],
        "quick": [60, 60],
    }
    assert [name for name, _ in runs].count("slow") == 1


def test_a_picture_is_drawn(scaling, tmp_path):
    rows = [{"method": "routing", "T": n, "ms": n, "MiB": n} for n in (64, 128)]
    scaling.draw([*rows, {"method": "torch", "T": 64, "ms": 3, "MiB": None}], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.representative("combiner, fixed", "jax.nn")
@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_timed_returns_the_same_shapes(scaling, name):
    passes = scaling.scaling_passes
    made = passes.ATTENTION[name](16, 1)
    output, of_inputs = made.run()[:2]
    shape = (1, 16, 1, passes.HEAD_DIM)
    assert output.shape == shape
    assert [of_inputs[x].shape for x in ("query", "key", "value")] == [shape] * 3
    assert made.mib > 0


def test_our_layer_returns_output_gradients_and_moved_centroids(scaling):
    passes = scaling.scaling_passes
    output, of_x, _, moved = passes.our_layer(128, selection="causal").run()
    assert output.shape == of_x.shape == (1, 128, passes.LAYER_WIDTH)
    assert jax.tree.leaves(moved)


@pytest.mark.oracle
def test_pytorch_s_attention_returns_those_shapes_too(scaling):
    pytest.importorskip("torch")
    passes = scaling.scaling_passes
    output, gradients = passes.torch_attention(32, 2).run()
    assert output.shape == (1, 2, 32, passes.HEAD_DIM)
    assert len(gradients) == 3
