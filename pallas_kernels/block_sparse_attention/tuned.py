"""The plans that `autotune` found fastest, for as long as the process lives."""

from typing import TypeVar

from pallas_kernels.block_sparse_attention.call import Call

_Plan = TypeVar("_Plan")

_fastest: dict[object, object] = {}


def pick(call: Call, plans: tuple[_Plan, ...]) -> _Plan:
    """Returns the plan that was fastest for calls like this one, else the first."""
    return _fastest.get(_key(call, plans), plans[0])  # type: ignore[return-value]


def remember(call: Call, plans: tuple[_Plan, ...], fastest: _Plan) -> None:
    """Makes `pick` return the plan for calls of these shapes with this choice of plans."""
    _fastest[_key(call, plans)] = fastest


def _key(call: Call, plans: tuple[object, ...]) -> object:
    # Plans hold the lengths, limits and blocks of the mask, and the target.
    return plans, call.query.shape, call.key.shape, str(call.query.dtype)
