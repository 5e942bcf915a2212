"""Copies of rows between matrices of different strides, such as the left part of an extended buffer.

torch moves a few bytes a thread and instruction where a matrix has gaps between its rows, and reaches less than half of
the memory's speed; rows whose values lie side by side can be moved in pieces of 16 bytes.

Shapes: [T, D] both.  Dtypes: any float dtype each; values are rounded once where they differ.
"""

import torch

from .dispatch import jit, launch_on, tl, triton, use_triton

_BLOCK = 1024


def copy_rows(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`target`, with the values of `source`; they may not overlap."""
    is_dense = target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
    has_rows = target.stride(-1) == source.stride(-1) == 1
    if is_dense or not (has_rows and use_triton(target) and use_triton(source)):
        return target.copy_(source)
    rows, width = target.shape
    if rows:
        with launch_on(target):
            _copy_rows_kernel[(rows, triton.cdiv(width, _BLOCK))](
                source, target, width, source.stride(0), target.stride(0), BLOCK=_BLOCK, num_warps=4
            )
    return target


@jit
def _copy_rows_kernel(source_ptr, target_ptr, width, source_stride, target_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    value = tl.load(source_ptr + row * source_stride + cols, mask=live)
    tl.store(target_ptr + row * target_stride + cols, value.to(target_ptr.dtype.element_ty), mask=live)
