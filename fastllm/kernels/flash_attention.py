"""Attention tile by tile, with what the library kernels lack: any mix of packed documents, window and soft-cap.

    out_i = sum_j p_ij v_j       p_i = softmax_j(c(scaling * q_i k_j))       c(s) = softcap * tanh(s / softcap), or s
    over   first(i) <= j < end(i)
    causal: first(i) = max(start of i's document, i - window + 1), end(i) = i + 1; else start and end of i's document

    dp_ij = dout_i v_j     ds_ij = p_ij (dp_ij - delta_i) c'_ij     delta_i = dout_i out_i     c' = 1 - (c / softcap)^2
    dq_i = scaling * sum_j ds_ij k_j     dk_j = scaling * sum_i ds_ij q_i     dv_j = sum_i p_ij dout_i

Shapes: q, out [B, H, S, E]; k, v [B, K, S, E] with H a multiple of K and E at most 256 (fp32: 128); any strides but
along E; lse (in base 2) and delta [B, H, S]. Key and value heads are not expanded: a program that computes dk and dv
of one key head walks over the query heads that share it. No atomics: the same bits on every run.
Dtypes: fp16, bf16, fp32; scores, statistics and accumulators are fp32. scaling > 0.
Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithms 1 and 2.
"""

from typing import Any

import torch

from .dispatch import (
    compiles_to_ptx,
    dot_precision,
    has_tensor_cores,
    is_hopper,
    launch_on,
    next_power_of_2,
    triton,
    use_triton,
)
from .documents import Documents
from .flash_attention_kernels import flash_forward_kernel, flash_key_gradient_kernel, flash_query_gradient_kernel
from .tensor_tiles import alignment, describe

MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
# (queries, keys, warps, stages) of a tile, by bytes of an element and the widest head it is for. They spill no register
# (on Blackwell, in few cases, up to 24 bytes a thread) and fit the shared memory of every GPU that the README names.
Tiles = dict[int, tuple[int, int, int, int]]
_FORWARD: dict[int, Tiles] = {
    2: {128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    4: {64: (32, 32, 8, 1), 128: (16, 32, 4, 1)},
}
# Queries that see both ways hold the end of their keys as well.
_FORWARD_BOTH_WAYS: dict[int, Tiles] = {
    2: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    4: _FORWARD[4],
}
_QUERY_GRADIENT: dict[int, Tiles] = {
    2: {64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    4: {64: (32, 32, 8, 1), 128: (16, 32, 8, 1)},
}
_KEY_GRADIENT: dict[int, Tiles] = {
    2: {64: (32, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
    4: {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
}
# A warp of an AMD GPU has twice the threads.
_GRADIENT_AMD: dict[int, Tiles] = {2: {256: (32, 32, 4, 1)}, 4: {128: (32, 32, 4, 1)}}
# Hopper's copy engine brings the tiles that a program walks over, ahead of their use. Two programs of four warps on a
# multiprocessor fill each other's waits better than one of eight.
_FORWARD_HOPPER: Tiles = {64: (64, 128, 4, 2), 128: (64, 64, 4, 3), 256: (128, 64, 8, 2)}
_QUERY_GRADIENT_HOPPER: Tiles = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (128, 32, 8, 2)}
_KEY_GRADIENT_HOPPER: Tiles = {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)}
# Capping takes registers, and so does it to hold both bounds of what keys see both ways.
_KEY_GRADIENT_HOPPER_CROWDED: Tiles = {**_KEY_GRADIENT_HOPPER, 128: (32, 64, 4, 3), 256: (32, 64, 8, 3)}
# Heads side by side read queries that the last-level cache should hold, by this measure of it in bytes.
_CACHE = 32 << 20
_ROWS_BEGIN = 4  # values of fp32: 16 bytes


def flash_attention_serves(q: torch.Tensor, dropout: float) -> bool:
    """Whether this kernel can run for queries `q`: it needs tensor cores that Triton knows, and knows no dropout."""
    if dropout or q.shape[-1] > MAX_HEAD_DIM.get(q.dtype, 0) or not use_triton(q):
        return False
    return has_tensor_cores(q)


def flash_attention_is_fastest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> bool:
    """Whether it has been measured ahead of torch's flash kernels (`benchmarks/results/attention_nvidia_h200.json`)."""
    is_measured = causal and q.shape[-1] in (64, 128, 256)
    return is_measured and is_hopper(q) and _is_described(q, alignment(q, k, v))


def flash_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    documents: Documents | None = None,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) outside autograd; out lies in memory as [B, S, H, E]."""
    q, k, v = (_unit_stride(t) for t in (q, k, v))
    batch, heads, length, width = q.shape
    out = torch.empty(batch, length, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = _statistics(q)
    starts, ends = (lse, lse) if documents is None else documents.bounds
    step = alignment(q, k, v, out)
    described = _is_described(q, step)
    tile = _tile(_FORWARD_HOPPER if described else _forward_tiles(q, causal), width)
    streamed = [describe(t, tile["BLOCK_N"], tile["BLOCK_E"]) if described else t for t in (k, v)]
    with launch_on(q):
        flash_forward_kernel[(triton.cdiv(length, tile["BLOCK_M"]), batch * heads)](
            q, *streamed, out, lse, starts, ends, *_strides(q, k, v, out), *lse.stride()[:2],
            *_sizes(q, k, scaling, window, softcap),
            **_flags(q, documents, softcap, causal), ALIGNMENT=step, DESCRIBED=described, **tile,
        )  # fmt: skip
    return out, lse


def flash_attention_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    documents: Documents | None = None,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each in its shape; `lse` as the forward gave it."""
    dout, out, q, k, v = (_unit_stride(t) for t in (dout, out, q, k, v))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)
    starts, ends = (lse, lse) if documents is None else documents.bounds
    given = (*lse.stride()[:2], *_sizes(q, k, scaling, window, softcap))
    step = alignment(q, k, v, out, dout, dq, dk)
    flags = {**_flags(q, documents, softcap, causal), "ALIGNMENT": step, "DESCRIBED": _is_described(q, step)}
    with launch_on(q):
        _query_gradient(q, k, v, out, dout, dq, (lse, delta, starts, ends), given, flags)
        _key_gradient(q, k, v, dout, dk, dv, (lse, delta, starts, ends), given, flags)
    return dq, dk, dv


def _query_gradient(q, k, v, out, dout, dq, per_row, given, flags) -> None:
    described = flags["DESCRIBED"]
    tile = _tile(_QUERY_GRADIENT_HOPPER if described else _gradient_tiles(_QUERY_GRADIENT, q), q.shape[-1])
    streamed = [describe(t, tile["BLOCK_N"], tile["BLOCK_E"]) if described else t for t in (k, v)]
    grid = triton.cdiv(q.shape[2], tile["BLOCK_M"]), q.shape[0] * q.shape[1]
    flash_query_gradient_kernel[grid](
        q, *streamed, out, dout, dq, *per_row, *_strides(q, k, v, out, dout, dq), *given,
        **flags, **tile,
    )  # fmt: skip


def _key_gradient(q, k, v, dout, dk, dv, per_row, given, flags) -> None:
    lse, delta, starts, ends = per_row
    batch, key_heads, length, width = k.shape
    described = flags["DESCRIBED"] and alignment(lse) > 1
    tile = _tile(_key_gradient_tiles(flags) if described else _gradient_tiles(_KEY_GRADIENT, q), width)
    strides = _strides(q, k, v, dout, dk, dv)
    if described:
        q, dout = (describe(t, tile["BLOCK_M"], tile["BLOCK_E"]) for t in (q, dout))
        lse, delta = (describe(t, tile["BLOCK_M"]) for t in (lse, delta))
    blocks, heads = triton.cdiv(length, tile["BLOCK_N"]), batch * key_heads
    abreast = _CACHE // (2 * length * width * k.element_size())
    flash_key_gradient_kernel[(blocks * heads,)](
        q, k, v, dout, dk, dv, lse, delta, starts, ends, *strides, *given, blocks, heads, min(max(abreast, 1), heads),
        **{**flags, "DESCRIBED": described}, **tile,
    )  # fmt: skip


def _statistics(q: torch.Tensor) -> torch.Tensor:
    """fp32 [B, H, S] whose rows begin where a descriptor can."""
    batch, heads, length, _ = q.shape
    padded = -(-length // _ROWS_BEGIN) * _ROWS_BEGIN
    return torch.empty(batch, heads, padded, dtype=torch.float32, device=q.device)[..., :length]


def _is_described(q: torch.Tensor, step: int) -> bool:
    """Whether tiles come through descriptors: there are tiles for two bytes an element, of aligned tensors."""
    return q.dtype.itemsize == 2 and step > 1 and is_hopper(q)


def _forward_tiles(q: torch.Tensor, causal: bool) -> Tiles:
    return (_FORWARD if causal else _FORWARD_BOTH_WAYS)[q.dtype.itemsize]


def _gradient_tiles(tiles: dict[int, Tiles], q: torch.Tensor) -> Tiles:
    return (tiles if torch.version.hip is None else _GRADIENT_AMD)[q.dtype.itemsize]


def _key_gradient_tiles(flags: dict[str, Any]) -> Tiles:
    is_crowded = flags["HAS_CAP"] or not flags["CAUSAL"]
    return _KEY_GRADIENT_HOPPER_CROWDED if is_crowded else _KEY_GRADIENT_HOPPER


def _tile(tiles: Tiles, width: int) -> dict[str, Any]:
    block = max(next_power_of_2(width), 16)
    queries, keys, warps, stages = next(tile for widest, tile in tiles.items() if block <= widest)
    return {"BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_E": block, "num_warps": warps, "num_stages": stages}


def _sizes(q: torch.Tensor, k: torch.Tensor, scaling: float, window: int, softcap: float) -> tuple[Any, ...]:
    _, heads, length, _ = q.shape
    return heads, heads // k.shape[1], length, scaling, softcap or 1.0, min(window or length, length)


def _flags(q: torch.Tensor, documents: Documents | None, softcap: float, causal: bool) -> dict[str, Any]:
    return {
        "HAS_DOCUMENTS": documents is not None, "HAS_CAP": softcap > 0, "CAUSAL": causal,
        "PRECISION": dot_precision(q.dtype), "PTX": compiles_to_ptx(q),
        "WIDTH": q.shape[-1],
    }  # fmt: skip


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Those of batch, head and position, for each."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
