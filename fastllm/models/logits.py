"""Logits that are computed when somebody looks at them.

A fused loss needs no logits, and for a long batch they are the largest tensor of the step. Trainers, metrics and custom
losses may still ask for `outputs.logits`: they get a tensor of the right shape whose values are made by the first
operation on it, with gradients to the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.linear_cross_entropy import PLAIN_LOGITS, LogitTransform


class LazyLogits(torch.Tensor):
    """`transform.of(head(hidden))` as float32 `[B, S, V]`, made on first use."""

    _hidden: torch.Tensor
    _head: Any
    _transform: LogitTransform
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, hidden: torch.Tensor, head: Any, transform: LogitTransform = PLAIN_LOGITS) -> LazyLogits:
        shape = (*hidden.shape[:-1], head.weight.shape[0])
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=hidden.device)
        lazy._hidden, lazy._head, lazy._transform, lazy._value = hidden, head, transform, None
        return lazy

    def materialize(self) -> torch.Tensor:
        """The real tensor; the same one each time."""
        value = self._value
        if value is None:
            hidden, weight = self._hidden, self._head.weight
            if hidden.dtype == torch.float32 and weight.dtype == torch.float16:
                hidden = hidden.half()
            value = self._value = self._transform.of(self._head(hidden)).float()
        return value

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, computed={self._value is not None})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ABOUT_SHAPE:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_real(args), **_real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_real(args), **_real(kwargs or {}))


# Answered without computing anything.
_ABOUT_SHAPE = {
    torch.Tensor.shape.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.dtype.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.device.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.is_cuda.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.layout.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.ndim.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.__repr__,
}


def _real(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.materialize()
    if isinstance(value, (tuple, list)):
        return type(value)(_real(item) for item in value)
    if isinstance(value, dict):
        return {key: _real(item) for key, item in value.items()}
    return value
