"""Rotary positions turn the pairs that they should, by the angles that they should."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax.model.rotary import attention_factor, frequencies, rotary
from tests.model import reference
from tests.model.harness import assert_close, in_float64, normal, small_config

LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_positions": 512,
    "rope_low_freq_factor": 2.0,
    "rope_high_freq_factor": 16.0,
}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_positions": 256}


@pytest.mark.parametrize("theta", [10.0, 1e6])
def test_pairs_of_the_two_halves_turn(theta):
    x, positions = normal(0, 2, 5, 3, 8), np.arange(10, dtype=np.int32).reshape(2, 5)
    actual = rotary(
        jnp.asarray(x), jnp.asarray(positions), small_config(rope_theta=theta, head_dim=8)
    )
    expected = in_float64(lambda x: reference.rotate(x, positions, theta), x)
    assert_close(actual, expected, 1e-6)


def test_products_depend_on_distances_only():
    query, key = (jnp.asarray(normal(seed, 1, 9, 1, 8)) for seed in range(2))
    positions = jnp.asarray([[3, 0, 7, 5, 5, 11, 2, 8, 1]])
    config = small_config(rope_theta=100.0, head_dim=8)

    def products(shift):
        rotated = (rotary(x, positions + shift, config) for x in (query, key))
        return jnp.einsum("btnh,bsnh->bts", *rotated)

    assert_close(products(50), products(0), 1e-5)
    assert jnp.abs(products(0) - jnp.einsum("btnh,bsnh->bts", query, key)).max() > 0.1


def test_a_part_of_the_head_turns():
    x, positions = normal(0, 1, 7, 2, 20), np.arange(7, dtype=np.int32)[None]
    config = small_config(head_dim=20, partial_rotary_factor=0.3, rope_theta=50.0)
    actual = rotary(jnp.asarray(x), jnp.asarray(positions), config)
    expected = in_float64(lambda x: reference.rotate(x, positions, 50.0), x[..., :6])
    assert_close(actual[..., :6], expected, 1e-6)
    np.testing.assert_array_equal(actual[..., 6:], x[..., 6:])


def test_linear_scaling_turns_as_positions_between():
    config = small_config(head_dim=8, rope_scaling="linear", rope_factor=4.0)
    x, positions = jnp.asarray(normal(0, 1, 5, 2, 8)), jnp.arange(5)[None]
    plain = rotary(x, positions, small_config(head_dim=8))
    assert_close(rotary(x, 4 * positions, config), plain, 1e-6)


def test_llama3_scales_what_turns_seldom():
    """By wavelengths, in tokens, and three cases."""
    config = small_config(head_dim=32, rope_theta=1000.0, **LLAMA3)
    expected, cases = [], set()
    for pair in range(16):
        frequency = 1000.0 ** (-pair / 16)
        wavelength = 2 * math.pi / frequency
        if wavelength < 512 / 16:
            case, factor = "kept", 1.0
        elif wavelength > 512 / 2:
            case, factor = "scaled", 1 / 8
        else:
            smooth = (512 / wavelength - 2) / (16 - 2)
            case, factor = "between", (1 - smooth) / 8 + smooth
        cases.add(case)
        expected.append(frequency * factor)
    assert cases == {"kept", "scaled", "between"}
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-5)


def test_yarn_scales_what_turns_seldom_along_a_ramp_of_pairs():
    config = small_config(head_dim=32, rope_theta=1000.0, rope_beta_fast=8.0, **YARN)

    def turns(pair):
        return 256 * 1000.0 ** (-pair / 16) / (2 * math.pi)

    first = max(pair for pair in range(16) if turns(pair) >= 8)  # the ramp leaves whole pairs out
    last = min(pair for pair in range(16) if turns(pair) <= 1)
    assert 0 < first < last - 1 < 14
    kept = np.interp(np.arange(16), [first, last], [1, 0])
    expected = 1000.0 ** (-np.arange(16) / 16) * (kept + (1 - kept) / 4)
    np.testing.assert_allclose(frequencies(config), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "given", "expected"), [(4.0, None, 1.1386294361), (1.0, None, 1), (4.0, 0.7, 0.7)]
)
def test_yarn_scales_queries_and_keys(factor, given, expected):
    changes = YARN | {"rope_factor": factor, "rope_attention_factor": given}
    config = small_config(head_dim=8, **changes)
    assert attention_factor(config) == pytest.approx(expected)
    x = jnp.asarray(normal(0, 1, 5, 2, 8))
    turned = rotary(x, jnp.zeros((1, 5), jnp.int32), config)
    assert_close(turned, expected * x, 1e-6)


def test_layers_of_a_local_base_are_not_scaled():
    config = small_config(rope_local_layers=(0, 2), rope_local_theta=50.0, **YARN)
    local = small_config(**YARN | {"rope_theta": 50.0, "rope_scaling": "none"})
    assert config.of_layer(0) == config.of_layer(2) == local
    assert config.of_layer(1) == small_config(**YARN)
