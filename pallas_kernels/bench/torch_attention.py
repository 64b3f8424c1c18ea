"""PyTorch's attention, dense and with a block mask, on its best device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array
from torch._functorch import config as functorch_config
from torch._inductor.choices import InductorChoices
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.contenders import Prepared, Unavailable

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_Attend = Callable[..., torch.Tensor]


def sdpa(case: Case, arrays: tuple[Array, ...]) -> Prepared:
    """Prepares `scaled_dot_product_attention`, causal."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=case.heads != case.kv_heads
        )

    return _prepare(attend, arrays, is_sparse=False, has_backward=True)


def flex(case: Case, arrays: tuple[Array, ...]) -> Prepared:
    """Prepares compiled `flex_attention` with the blocks of the case."""
    if _DEVICE == "cpu" and case.dtype != "float32":
        raise Unavailable("FlexAttention on a CPU is compared in float32 only")
    # The backward pass runs many times on what one forward pass saved.
    functorch_config.donated_buffer = False
    # Its own tiles for a Hopper GPU are 128 wide, and it refuses a mask with finer blocks.
    # Forward it can be told others; backward they are a choice of the compiler.
    options = None
    if _DEVICE == "cuda" and case.block_size < 128:
        tile = min(64, case.block_size)
        options = {"BLOCK_M": tile, "BLOCK_N": tile, "num_warps": 4}
        _use_backward_tiles(tile)
    attend = functools.partial(
        torch.compile(flex_attention),
        block_mask=_block_mask(case),
        enable_gqa=case.heads != case.kv_heads,
        kernel_options=options,
    )

    # FlexAttention's backward pass exists on GPUs alone.
    prepared = _prepare(attend, arrays, is_sparse=True, has_backward=_DEVICE == "cuda")
    # First calls compile: with gradients, and without.
    prepared.results()
    prepared.forward(1)
    return prepared


def _use_backward_tiles(tile: int) -> None:
    """Has the compiler take square tiles in FlexAttention's backward pass.

    Its settings would be those of one thread, and backward passes compile in another.
    """
    choose = InductorChoices.get_flex_attention_bwd_configs

    def configs(self: InductorChoices, *args: Any, **kwargs: Any) -> list[Any]:
        own, *_ = choose(self, *args, **kwargs)
        tiles = dict.fromkeys(("block_m1", "block_n1", "block_m2", "block_n2"), tile)
        return [dataclasses.replace(own, **tiles, num_warps=4)]

    mock.patch.object(InductorChoices, choose.__name__, configs).start()


def _block_mask(case: Case) -> BlockMask:
    """Returns the same lists: the diagonal is partial, everything below it full."""
    group = case.heads // case.kv_heads
    blocks = np.repeat(case.block_map, group, axis=0)
    diagonal = np.broadcast_to(np.eye(blocks.shape[-1], dtype=bool), blocks.shape)
    return BlockMask.from_kv_blocks(
        *_lists(diagonal),
        *_lists(blocks & ~diagonal),
        BLOCK_SIZE=case.block_size,
        mask_mod=lambda batch, head, query, key: query >= key,
        seq_lengths=(case.length, case.length),
    )


def _lists(blocks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    counts = blocks.sum(-1).astype(np.int32)
    order = np.argsort(~blocks, axis=-1, kind="stable").astype(np.int32)
    return torch.tensor(counts[None], device=_DEVICE), torch.tensor(order[None], device=_DEVICE)


def _prepare(
    attend: _Attend, arrays: tuple[Array, ...], *, is_sparse: bool, has_backward: bool
) -> Prepared:
    *inputs, d_out = (_tensor(array) for array in arrays)
    if has_backward:
        inputs = [array.requires_grad_() for array in inputs]

    def forward(times: int) -> None:
        with torch.no_grad():
            for _ in range(times):
                attend(*inputs)
        _wait()

    graph: list[torch.Tensor] = []

    def backward(times: int) -> None:
        graph[:] = graph or [attend(*inputs)]
        for _ in range(times):
            torch.autograd.grad(graph[0], inputs, d_out, retain_graph=True)
        _wait()

    def results() -> tuple[Array, ...]:
        out = attend(*inputs)
        if not has_backward:
            return (_array(out),)
        return tuple(map(_array, (out, *torch.autograd.grad(out, inputs, d_out))))

    return Prepared(forward, backward if has_backward else None, results, is_sparse)


def _tensor(array: Array) -> torch.Tensor:
    """Returns [B, N, T, H]."""
    tensor = torch.tensor(np.asarray(array, np.float32), device=_DEVICE)
    return tensor.to(getattr(torch, str(array.dtype))).transpose(1, 2).contiguous()


def _array(tensor: torch.Tensor) -> Array:
    return jnp.asarray(tensor.detach().float().cpu().numpy()).swapaxes(1, 2)


def _wait() -> None:
    if _DEVICE == "cuda":
        torch.cuda.synchronize()
