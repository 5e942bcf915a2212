"""Matrix products whose results are fp32, from matrices in 16 bits."""

import torch

_HALVES = (torch.bfloat16, torch.float16)


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right with an fp32 result from 16-bit inputs (float64 stays float64)."""
    if left.dtype not in _HALVES:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total`, in fp32 or wider, plus left @ right, in place."""
    if total.is_cuda and left.dtype in _HALVES:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.addmm_(left.to(total.dtype), right.to(total.dtype))
