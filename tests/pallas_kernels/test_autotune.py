"""Plans are measured, the fastest is taken from then on, and failures are passed over."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockMask, Local, autotune, block_sparse_attention, targets
from pallas_kernels.block_sparse_attention import pallas_tpu, tuned, tuner
from pallas_kernels.targets import Target

INTERPRETED = Target("tpu", interpret=True)
MASK = BlockMask.from_rule(Local(64, left=2), 128, is_causal=True)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(tuned, "_fastest", {})


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, 128, 1, 64), jnp.bfloat16) for key in keys]


def backend(broken):
    """The TPU kernels, some of whose plans fail."""

    def run(plan, call):
        if plan in broken:
            raise RuntimeError("out of shared memory\nand more")
        return pallas_tpu.run(plan, call)

    return types.SimpleNamespace(refusal=pallas_tpu.refusal, plans=pallas_tpu.plans, run=run)


def measured(monkeypatch, arrays, *, broken=()):
    """Returns the report when each plan is faster than the one before it."""
    speeds = iter([8.0, 4.0, 2.0, 1.0])

    def time(run, plan, call):
        run(plan, call)
        return next(speeds)

    call = tuner.checked(*arrays, MASK, is_causal=True)
    plans = pallas_tpu.plans(call, INTERPRETED)
    failing = [plans[number] for number in broken]
    monkeypatch.setattr(tuner, "_time", time)
    fake = backend(failing)
    monkeypatch.setattr(type(tuner.IMPLEMENTATIONS), "load", lambda self, name: fake)
    with targets.use(INTERPRETED):
        (report,) = autotune(*arrays, MASK, is_causal=True, implementation="pallas_tpu")
    return call, plans, report


def test_the_fastest_is_taken_from_then_on(monkeypatch, arrays):
    call, plans, report = measured(monkeypatch, arrays)
    assert len(plans) > 1
    assert tuned.pick(call, plans) == plans[len(plans) - 1] == report.fastest
    longer = tuner.checked(*(jnp.tile(x, (2, 1, 1, 1)) for x in arrays), MASK, is_causal=True)
    assert tuned.pick(longer, plans) == plans[0]


def test_failures_are_passed_over(monkeypatch, arrays):
    last = 1
    call, plans, report = measured(monkeypatch, arrays, broken=[last])
    assert report.failures == {last: "RuntimeError: out of shared memory"}
    assert tuned.pick(call, plans) != plans[last]
    assert "out of shared memory" in str(report)
    assert str(report).count("(taken)") == 1


def test_the_default_stays_when_all_fail(monkeypatch, arrays):
    call = tuner.checked(*arrays, MASK, is_causal=True)
    number = len(pallas_tpu.plans(call, INTERPRETED))
    call, plans, report = measured(monkeypatch, arrays, broken=range(number))
    assert not report.ms
    assert tuned.pick(call, plans) == plans[0]


def test_measured_for_real(arrays):
    with targets.use(INTERPRETED):
        (report,) = autotune(*arrays, MASK, is_causal=True)
        out = block_sparse_attention(*arrays, MASK, is_causal=True)
    assert report.implementation == "pallas_tpu"
    assert all(ms > 0 for ms in report.ms.values())
    assert not report.failures
    expected = block_sparse_attention(*arrays, MASK, is_causal=True, implementation="reference")
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)


def test_nothing_to_tune_on_a_cpu(arrays):
    assert autotune(*arrays, MASK, is_causal=True) == []
