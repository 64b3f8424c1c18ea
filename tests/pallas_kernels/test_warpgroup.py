"""Products under way: a wait that is missing fails tests of the kernels, on a CPU too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention import mosaic_gpu
from pallas_kernels.block_sparse_attention.mosaic_gpu import kernels
from pallas_kernels.block_sparse_attention.mosaic_gpu.products import Simulated
from pallas_kernels.block_sparse_attention.mosaic_gpu.rings import Ring, tile_scratch
from pallas_kernels.block_sparse_attention.mosaic_gpu.warpgroup import ROWS, Warpgroup
from tests.pallas_kernels import gpu_interpreter, kernel_cases

STEPS, SIMULATED = 3, gpu_interpreter.SIMULATED


def sum_of_products(left, rights, is_released_early):
    """Returns sum_n left @ rights[n]', the right ones through a ring with a single stage."""

    def body(_, left_ref, rights_ref, outputs, own, ready, ring):
        ring, warpgroup = Ring(*ring), Warpgroup(is_simulated=True)

        def compute(_):
            plgpu.copy_gmem_to_smem(left_ref, own, ready)
            plgpu.barrier_wait(ready)

            def add(step, total):
                release = functools.partial(ring.release, step)
                meanwhile = release if is_released_early else None
                total = total + warpgroup.product((own,), ring.wait(step), meanwhile)
                if not is_released_early:
                    release()
                return total

            outputs[0][...] = lax.fori_loop(0, STEPS, add, warpgroup.zeros(ROWS))

        def produce():
            for step in range(STEPS):
                ring.fill(jnp.int32(step), (rights_ref.at[step],))
            ring.drain(jnp.int32(STEPS))

        kernels.by_role(compute, produce, 1)

    shape = (ROWS, left.shape[1])
    (total,) = kernels.start(
        body,
        (left, rights),
        target=SIMULATED,
        outputs=(jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32),),
        scratch=(
            tile_scratch(shape, left.dtype, 1),
            plgpu.Barrier(),
            Ring.scratch(1, (1, *shape), left.dtype, 1),
        ),
        grid=(1, 1, 1),
        compute_warpgroups=1,
    )
    return total


@pytest.mark.parametrize("is_released_early", [False, True])
def test_what_a_product_reads_is_not_released_before_the_wait(capsys, is_released_early):
    rng = np.random.default_rng(0)
    left, *rights = jnp.asarray(rng.standard_normal((1 + STEPS, ROWS, 64)), jnp.bfloat16)
    total = sum_of_products(left, jnp.stack(rights), is_released_early)
    assert ("RACE DETECTED" in capsys.readouterr().out) == is_released_early
    if not is_released_early:
        expected = sum(np.float64(left) @ np.float64(right).T for right in rights)
        np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-4)


def test_kernels_that_do_not_wait_compute_nothing(monkeypatch):
    """All of them: out and the three gradients."""
    gpu_interpreter.compile_once(monkeypatch)
    monkeypatch.setattr(Simulated, "wait", lambda self, under_way=0: None)
    call = kernel_cases.make(kernel_cases.CASES["bfloat16"])
    attend = functools.partial(mosaic_gpu.attend, target=gpu_interpreter.INTERPRETED)
    out, _, *gradients = kernel_cases.results(attend, call)
    truth, _, *true_gradients = kernel_cases.expected(call)
    for one, other in zip((out, *gradients), (truth, *true_gradients), strict=True):
        assert not np.allclose(np.float64(one), other, atol=0.1)
