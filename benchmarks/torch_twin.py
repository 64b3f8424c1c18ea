"""The dense model and its training step in PyTorch: what one would write without this project.

Eager modules and `torch.nn.functional`, attention by `scaled_dot_product_attention`, fused AdamW:
the same parameters, formulas and order of operations as ours, but one document a row.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional as F

# What is written out below; another setting would be another model.
_EXPECTED = {
    "position": "rope",
    "rope_scaling": "none",
    "rope_local_layers": (),
    "partial_rotary_factor": 1.0,
    "norm_unit_offset": False,
    "post_norm": False,
    "embedding_scale": 1.0,
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "is_causal": True,
    "tie_embeddings": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "attention_soft_cap": None,
    "logits_soft_cap": None,
    "dropout": 0.0,
    "param_dtype": "float32",
    "compute_dtype": "float32",
}


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped queries."""

    def __init__(self, model: ConfigDict) -> None:
        super().__init__()
        self.head_dim, self.eps = model.head_dim, model.norm_eps
        self.scale = model.attention_scale
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.query = nn.Linear(model.embed_dim, width, bias=False)
        self.key = nn.Linear(model.embed_dim, kv_width, bias=False)
        self.value = nn.Linear(model.embed_dim, kv_width, bias=False)
        self.out = nn.Linear(width, model.embed_dim, bias=False)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(model.head_dim, eps=model.norm_eps) if model.qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Returns the residual [B, T, D] of x; rotation holds cos and sin, [2, T, H/2]."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(
            _rotated(self.query_norm(query), rotation),
            _rotated(self.key_norm(key), rotation),
            value,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, model: ConfigDict) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.embed_dim, eps=model.norm_eps)
        self.attention = Attention(model)
        self.mlp_norm = nn.RMSNorm(model.embed_dim, eps=model.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "gate": nn.Linear(model.embed_dim, model.mlp_dim, bias=False),
                "up": nn.Linear(model.embed_dim, model.mlp_dim, bias=False),
                "down": nn.Linear(model.mlp_dim, model.embed_dim, bias=False),
            }
        )

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream after the block."""
        x = x + self.attention(self.attention_norm(x), rotation)
        y = self.mlp_norm(x)
        return x + self.mlp["down"](F.silu(self.mlp["gate"](y)) * self.mlp["up"](y))


class Twin(nn.Module):
    """The model of a config.

    Raises:
        ValueError: the config asks for what is not written here.
    """

    def __init__(self, model: ConfigDict) -> None:
        super().__init__()
        for name, value in _EXPECTED.items():
            if model[name] != value:
                raise ValueError(f"model.{name}={model[name]!r}: the twin has {value!r} only")
        self.head_dim, self.theta = model.head_dim, model.rope_theta
        self.embedding = nn.Embedding(model.vocab_size, model.embed_dim)
        self.layers = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.final_norm = nn.RMSNorm(model.embed_dim, eps=model.norm_eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, T, V]."""
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half) / half)
        angles = torch.arange(tokens.shape[1])[:, None] * frequencies
        rotation = torch.stack([angles.cos(), angles.sin()])
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, rotation)
        return F.linear(self.final_norm(x), self.embedding.weight)

    def load(self, layers: Mapping[str, Any]) -> None:
        """Takes our parameters, by their names by layer: "layers/7/attention/query/kernel"."""
        state = {}
        for name, value in layers.items():
            array = np.asarray(value)
            if name.endswith("/kernel"):  # [*in, *out] there, [out, in] here
                array = array.reshape(_in_size(name, array), -1).T
            path = name.replace("/", ".").rpartition(".")[0]
            state[f"{path}.weight"] = torch.tensor(array.copy())
        self.load_state_dict(state)


class Step:
    """One optimiser step: gradients, clipping, AdamW at the rate of its number.

    Raises:
        ValueError: the optimiser is another.
    """

    def __init__(self, model: Twin, optimizer: ConfigDict, rates: Iterable[float]) -> None:
        if optimizer.name != "adamw":
            raise ValueError(f"optimizer.name={optimizer.name!r}: the twin has 'adamw' only")
        self.model, self.rates = model, iter(rates)
        self.clip_norm = optimizer.clip_norm or float("inf")
        matrices = [p for name, p in model.named_parameters() if _is_matrix(name)]
        others = [p for name, p in model.named_parameters() if not _is_matrix(name)]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": optimizer.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            fused=True,
        )

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
        """Returns the loss and the norm of its gradient, both before the step."""
        self.adamw.zero_grad()
        logits = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        rate = next(self.rates)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        return loss.item(), norm.item()


def _in_size(name: str, array: np.ndarray) -> int:
    """The size of what a kernel is applied to."""
    in_dims = 2 if name.endswith("attention/out/kernel") else 1
    return int(np.prod(array.shape[:in_dims]))


def _is_matrix(name: str) -> bool:
    """Whether a parameter has weight decay: no norm and no embedding."""
    return "norm" not in name and "embedding" not in name


def _rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
