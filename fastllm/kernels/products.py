"""Matrix products whose results are fp32, from matrices in 16 bits."""

import torch

_HALVES = (torch.bfloat16, torch.float16)


def matmul_fp32(left: torch.Tensor, right: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
    """`factor` times left @ right, with an fp32 result from 16-bit inputs (float64 stays float64)."""
    if left.dtype in _HALVES and left.is_cuda:
        if factor == 1.0:
            return torch.mm(left, right, out_dtype=torch.float32)
        out = torch.empty(left.shape[0], right.shape[1], dtype=torch.float32, device=left.device)
        return torch.addmm(out, left, right, beta=0, alpha=factor, out_dtype=torch.float32, out=out)
    product = left.float() @ right.float() if left.dtype in _HALVES else left @ right
    return product if factor == 1.0 else product * factor


def add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total`, in fp32 or wider, plus left @ right, in place."""
    if total.is_cuda and left.dtype in _HALVES:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.addmm_(left.to(total.dtype), right.to(total.dtype))
