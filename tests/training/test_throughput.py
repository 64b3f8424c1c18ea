"""Achieved FLOP/s, and their part of the peak where that is published."""

import types

import jax
import pytest

from sparseformer_jax.training import throughput


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA T4", None),
    ],
)
def test_peaks_are_those_of_the_makers(device_kind, peak):
    assert throughput.peak_flops(device_kind) == peak


def test_mfu_is_a_part_of_all_devices_peak(monkeypatch):
    device = types.SimpleNamespace(device_kind="TPU v4")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 2)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    numbers = throughput.throughput(tokens=1000.0, seconds=0.5, flops=55e12)
    assert numbers == {
        "tokens_per_second": 2000.0,
        "flops_per_second": 110e12,
        "mfu": 110 / (2 * 275),
    }


def test_no_mfu_without_a_peak():
    assert "mfu" not in throughput.throughput(1.0, 1.0, 1.0)
