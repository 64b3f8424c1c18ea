"""What a device achieves, beside what its maker says it can."""

import jax

# Dense bf16 FLOP/s of a device, from the makers' data sheets, by a part of JAX's device_kind;
# the first match counts.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the published bf16 FLOP/s of a device, None where it is not in the table."""
    return next((peak for part, peak in _PEAKS.items() if part in device_kind), None)


def throughput(tokens: float, seconds: float, flops: float) -> dict[str, float]:
    """Returns what a step amounts to that predicts `tokens` in `seconds`, over all devices.

        tokens_per_second = tokens / seconds
        flops_per_second = flops / seconds
        mfu = flops_per_second / (devices * peak)

    the last where the peak is known. `flops` of the step are the model's (Chowdhery et al. 2022,
    PaLM, appendix B): what remat computes again does not count, nor do pairs that no query
    attends to.
    """
    numbers = {
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops / seconds,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        numbers["mfu"] = numbers["flops_per_second"] / (jax.device_count() * peak)
    return numbers
