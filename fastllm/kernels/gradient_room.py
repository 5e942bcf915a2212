"""Gradients of the residual stream that have room beside them.

A layer's backward begins with [dY | dY B], the gradient of its output beside what LoRA makes of it (lora.py). The layer
that comes before it in the backward writes that gradient, so it can leave the room, and no copy is needed. autograd
carries the left part of such a buffer on; here the whole of it is remembered until the next backward asks.

Shapes: buffers [T, N + E], gradients [T, N].
"""

import torch
from torch.autograd import Variable

from .projections import ProjectionGroup
from .row_copy import copy_rows


class GradientRoom:
    """The buffer of the newest gradient that the layers of one model handed on.

    It is held until the next of them takes it or the backward ends, so no other tensor can have its address.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def __reduce__(self) -> tuple:
        return GradientRoom, ()  # a copied or stored model has its own

    def buffer(self, group: ProjectionGroup, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Where a gradient is written that a layer hands on, with the room that `group` wants beside it."""
        return group.output_buffer(like, dtype)

    def leave(self, buffer: torch.Tensor) -> None:
        """Remember `buffer`, whose left part becomes the gradient that a backward, which runs now, returns."""
        self._buffer = buffer
        Variable._execution_engine.queue_callback(self._clear)  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, gradient: torch.Tensor, width: int) -> torch.Tensor | None:
        """The buffer of that width whose left part `gradient [T, N]` is, where this is known."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or (buffer.shape, buffer.dtype) != ((gradient.shape[0], width), gradient.dtype):
            return None
        is_left_part = buffer.data_ptr() == gradient.data_ptr() and buffer.stride() == gradient.stride()
        return buffer if is_left_part else None

    def _clear(self) -> None:
        self._buffer = None


def with_room(
    group: ProjectionGroup, gradient: torch.Tensor, dtype: torch.dtype, room: GradientRoom | None
) -> torch.Tensor:
    """`gradient [T, N]` as the left part of a buffer of `group.output_buffer`: where it is if it has that room."""
    known = None
    if room is not None and gradient.dtype == dtype:
        known = room.take(gradient, group.output_buffer_width)
    if known is not None:
        return known
    if gradient.dtype == dtype and gradient.shape[1] == group.output_buffer_width and gradient.stride(1) == 1:
        return gradient  # nothing goes beside it
    buffer = group.output_buffer(gradient, dtype)
    copy_rows(buffer[:, : group.out_features], gradient)
    return buffer
