"""Rows of a table in host memory, read by the GPU itself.

The pages of the table are locked and mapped into the GPU's address space, so a kernel reads over the bus just the rows
that are asked for: nothing is copied twice, and the host never waits to see which rows they are.

Shapes: table [V, D]; indices [...]; rows [..., D].
Source: NVIDIA, "CUDA C++ Programming Guide", section "Mapped Memory".
"""

import torch

from .._locked_memory import locked_bytes
from .dispatch import jit, launch_on, next_power_of_2, tl, triton, use_triton

_BLOCK = 4096


def host_table(values: torch.Tensor) -> torch.Tensor:
    """A copy of `values [V, D]` in host memory, locked where that can be."""
    memory = locked_bytes(values.nbytes)
    if memory is None:
        return values.detach().cpu().clone()
    return memory.view(values.dtype).view(values.shape).copy_(values.detach())


def is_readable(table: torch.Tensor, device: torch.device) -> bool:
    """Whether kernels on `device` can read a table that is in host memory."""
    return device.type == "cuda" and table.is_contiguous() and table.is_pinned()


def read_rows(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`table[indices]` on the device of `indices`, int64. Not differentiable.

    Where a kernel reads the table, which `is_readable` has to allow, an index outside of it fails as it does in torch:
    on the device, when that gets there.
    """
    rows = torch.empty(*indices.shape, table.shape[1], dtype=table.dtype, device=indices.device)
    if not use_triton(rows):
        return rows.copy_(read_rows_reference(table, indices))
    torch._assert_async(
        ((indices >= 0) & (indices < table.shape[0])).all(), "an index is outside of the table in host memory"
    )
    if rows.numel():
        block = min(_BLOCK, next_power_of_2(table.shape[1]))
        with launch_on(rows):
            _read_rows_kernel[(indices.numel(), triton.cdiv(table.shape[1], block))](
                table, indices.contiguous(), rows, *table.shape, BLOCK=block, num_warps=8
            )
    return rows


def read_rows_reference(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The definition: the rows, in host memory."""
    return torch.nn.functional.embedding(indices.to(table.device), table)


@jit
def _read_rows_kernel(table_ptr, indices_ptr, rows_ptr, num_rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + row)
    inside = (index >= 0) & (index < num_rows) & (columns < width)
    values = tl.load(table_ptr + index * width + columns, mask=inside, other=0.0)
    tl.store(rows_ptr + row * width + columns, values, mask=columns < width)
