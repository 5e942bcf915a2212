"""Tiles of tensors [B, H, S, E] and [B, H, S], as kernels read and write them: by an address for each row, or through
a descriptor, from which Hopper's copy engine brings a tile to shared memory without registers or threads.

A tile starts at a position of one head and runs along S; what lies past the end of the sequence or of the head reads as
0 and is not written. A descriptor stands in the place of a tensor's pointer, and its strides are then not looked at.
Source: Triton's `TensorDescriptor`; NVIDIA, "CUDA Driver API", `cuTensorMapEncodeTiled`, for what can be described.
"""

from typing import Any

import torch

from .dispatch import TensorDescriptor, jit, tl

_ALIGNMENT = 16


def alignment(*tensors: torch.Tensor) -> int:
    """How many elements make 16 bytes, where rows of each tensor begin at multiples of that; else 1."""
    elements = _ALIGNMENT // tensors[0].element_size()
    return elements if all(map(_is_aligned, tensors)) else 1


def describe(t: torch.Tensor, *block: int) -> Any:
    """The descriptor of `t`, for tiles of `block` along its last dimensions."""
    whole_block = [1] * (t.ndim - len(block)) + list(block)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), whole_block)


def _is_aligned(t: torch.Tensor) -> bool:
    steps = [stride * t.element_size() for stride in t.stride()[:-1]]
    is_dense = t.stride(-1) == 1
    return is_dense and t.data_ptr() % _ALIGNMENT == 0 and all(step > 0 and step % _ALIGNMENT == 0 for step in steps)


@jit
def _address_of(
    t, batch, head, row, batch_stride, head_stride, row_stride,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    first = tl.multiple_of(batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride, ALIGNMENT)
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * row_stride
    return t + first + tl.multiple_of(rows, (ALIGNMENT, ALIGNMENT)) + tl.arange(0, BLOCK_E)[None, :]


@jit
def _is_within(row, length, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    return (row + tl.arange(0, ROWS) < length)[:, None] & (tl.arange(0, BLOCK_E) < WIDTH)[None, :]


@jit
def load_rows(
    t, batch, head, row, batch_stride, head_stride, row_stride, length,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK_E] of [B, H, S, E = WIDTH] from position `row` on, by addresses; strides are multiples of
    `ALIGNMENT` elements."""
    at = _address_of(t, batch, head, row, batch_stride, head_stride, row_stride, ROWS, BLOCK_E, ALIGNMENT)
    return tl.load(at, mask=_is_within(row, length, WIDTH, ROWS, BLOCK_E), other=0.0)


@jit
def load_tile(
    t, batch, head, row, batch_stride, head_stride, row_stride, length,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNMENT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The same; `t` is a descriptor where it is `DESCRIBED`."""
    if DESCRIBED:
        tile = tl.reshape(t.load([batch, head, row, 0]), (ROWS, BLOCK_E))
    else:
        tile = load_rows(
            t, batch, head, row, batch_stride, head_stride, row_stride, length, WIDTH, ROWS, BLOCK_E, ALIGNMENT
        )
    return tile


@jit
def load_values(t, batch, head, row, batch_stride, head_stride, length, COUNT: tl.constexpr, DESCRIBED: tl.constexpr):
    """[COUNT] of [B, H, S] from position `row` on."""
    if DESCRIBED:
        values = tl.reshape(t.load([batch, head, row]), (COUNT,))
    else:
        at = row + tl.arange(0, COUNT)
        first = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        values = tl.load(t + first + at, mask=at < length, other=0.0)
    return values


@jit
def store_rows(
    t, batch, head, row, batch_stride, head_stride, row_stride, length, value,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Writes `value [ROWS, BLOCK_E]` to [B, H, S, E] from position `row` on, in its dtype."""
    at = _address_of(t, batch, head, row, batch_stride, head_stride, row_stride, ROWS, BLOCK_E, ALIGNMENT)
    tl.store(at, value.to(t.dtype.element_ty), mask=_is_within(row, length, WIDTH, ROWS, BLOCK_E))


@jit
def store_values(t, batch, head, row, batch_stride, head_stride, length, value, COUNT: tl.constexpr):
    """Writes `value [COUNT]` to [B, H, S] from position `row` on."""
    at = row + tl.arange(0, COUNT)
    tl.store(t + batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride + at, value, mask=at < length)
