"""Attention tile by tile, with what the library kernels lack: any mix of packed documents, window and soft-cap.

    out_i = sum_j p_ij v_j       p_i = softmax_j(c(scaling * q_i k_j))       c(s) = softcap * tanh(s / softcap), or s
    over   first(i) <= j < end(i)
    causal: first(i) = max(start of i's document, i - window + 1), end(i) = i + 1; else start and end of i's document

    dp_ij = dout_i v_j     ds_ij = p_ij (dp_ij - delta_i) c'_ij     delta_i = dout_i out_i     c' = 1 - (c / softcap)^2
    dq_i = scaling * sum_j ds_ij k_j     dk_j = scaling * sum_i ds_ij q_i     dv_j = sum_i p_ij dout_i

In the forward, tiles in which every query sees every key, which are most, have a loop of their own, without masks.

Shapes: q, out [B, H, S, E]; k, v [B, K, S, E] with H a multiple of K and E at most 256 (fp32: 128); any strides but
along E; lse (in base 2) and delta [B, H, S]. Key and value heads are not expanded: a program that computes dk and dv
of one key head walks over the query heads that share it. No atomics: the same bits on every run.
Dtypes: fp16, bf16, fp32; scores, statistics and accumulators are fp32.
Source: Dao, "FlashAttention-2", arXiv 2307.08691, algorithms 1 and 2.
"""

from typing import Any

import torch

from .dispatch import (
    compiles_to_ptx,
    dot_precision,
    has_tensor_cores,
    jit,
    launch_on,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from .documents import Documents
from .soft_cap import soft_cap_slope, soft_capped

MAX_HEAD_DIM = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
# (queries, keys, warps, stages) of a tile, by bytes of an element and the widest head it is for. They spill no register
# and fit the shared memory of every GPU that the README names.
_FORWARD = {
    2: {128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    4: {64: (32, 32, 8, 1), 128: (16, 32, 4, 1)},
}
# Queries that see both ways hold the end of their keys as well.
_FORWARD_BOTH_WAYS = {
    2: {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    4: _FORWARD[4],
}
_BACKWARD = {
    2: {64: (32, 64, 4, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    4: {64: (32, 32, 8, 1), 128: (16, 16, 8, 1)},
}
# A warp of an AMD GPU has twice the threads.
_BACKWARD_AMD = {2: {256: (32, 32, 4, 1)}, 4: {128: (32, 32, 4, 1)}}


def flash_attention_serves(q: torch.Tensor, dropout: float) -> bool:
    """Whether this kernel can run for queries `q`: it needs tensor cores that Triton knows, and knows no dropout."""
    if dropout or q.shape[-1] > MAX_HEAD_DIM.get(q.dtype, 0) or not use_triton(q):
        return False
    return has_tensor_cores(q)


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
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    starts, ends = (lse, lse) if documents is None else documents.bounds
    tile = _tile((_FORWARD if causal else _FORWARD_BOTH_WAYS)[q.dtype.itemsize], width)
    with launch_on(q):
        _flash_fwd_kernel[(triton.cdiv(length, tile["BLOCK_M"]), batch * heads)](
            q, k, v, out, lse, starts, ends, *_strides(q, k, v, out), heads, heads // k.shape[1], length, width,
            scaling, softcap or 1.0, min(window or length, length),
            HAS_DOCUMENTS=documents is not None, HAS_CAP=softcap > 0, CAUSAL=causal, PRECISION=dot_precision(q.dtype),
            PTX=compiles_to_ptx(q), **tile,
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
    """Gradients of q, k and v, each in its shape."""
    dout, q, k, v = (_unit_stride(t) for t in (dout, q, k, v))
    batch, heads, length, width = q.shape
    key_heads = k.shape[1]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    delta = torch.empty_like(lse)
    starts, ends = (lse, lse) if documents is None else documents.bounds
    sizes = (heads, heads // key_heads, length, width, scaling, softcap or 1.0, min(window or length, length))
    tiles = _BACKWARD if torch.version.hip is None else _BACKWARD_AMD
    flags = {
        "HAS_DOCUMENTS": documents is not None,
        "HAS_CAP": softcap > 0,
        "CAUSAL": causal,
        "PRECISION": dot_precision(q.dtype),
        "PTX": compiles_to_ptx(q),
        **_tile(tiles[q.dtype.itemsize], width),
    }
    programs = triton.cdiv(length, flags["BLOCK_M"])
    with launch_on(q):
        _flash_bwd_q_kernel[(programs, batch * heads)](
            q, k, v, out, dout, lse, delta, dq, starts, ends, *_strides(q, k, v, out, dout, dq), *sizes, **flags
        )
        programs = triton.cdiv(length, flags["BLOCK_N"])
        _flash_bwd_kv_kernel[(programs, batch * key_heads)](
            q, k, v, dout, lse, delta, dk, dv, starts, ends, *_strides(q, k, v, dout, dk, dv), *sizes, **flags
        )
    return dq, dk, dv


def _tile(tiles: dict[int, tuple[int, int, int, int]], width: int) -> dict[str, Any]:
    block = max(next_power_of_2(width), 16)
    queries, keys, warps, stages = next(tile for widest, tile in tiles.items() if block <= widest)
    return {"BLOCK_M": queries, "BLOCK_N": keys, "BLOCK_E": block, "num_warps": warps, "num_stages": stages}


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Those of batch, head and position, for each."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@jit
def _load_tile(base, first_row, row_stride, length, width, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows [ROWS, BLOCK_E] from `first_row` on; zeros past the end of the sequence and of the head."""
    rows, cols = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    live = (rows < length)[:, None] & (cols < width)[None, :]
    at = base + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    return tl.load(at, mask=live, other=0.0)


@jit
def _store_tile(base, first_row, row_stride, length, width, value, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    rows, cols = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_E)
    live = (rows < length)[:, None] & (cols < width)[None, :]
    at = base + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=live)


@jit
def _keys_seen_by(
    queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS: tl.constexpr, CAUSAL: tl.constexpr
):
    """Of each query, the first key that it sees and the one after the last; none for queries past the end."""
    live = queries < length
    first = tl.zeros_like(queries)
    end = first + length
    if HAS_DOCUMENTS:
        first = tl.load(starts_ptr + batch * length + queries, mask=live, other=0)
    if CAUSAL:
        first = tl.maximum(first, queries - window + 1)
        end = queries + 1
    elif HAS_DOCUMENTS:
        end = tl.load(ends_ptr + batch * length + queries, mask=live, other=0)
    return tl.where(live, first, length), tl.where(live, end, 0)


@jit
def _is_seen(keys, queries, first, end, CAUSAL: tl.constexpr):
    """Whether each query of a tile sees each key, given its `first` key and the `end` of its keys. A causal tile has
    that end in its queries, which takes no registers."""
    if CAUSAL:
        return (keys <= queries) & (keys >= first)
    return (keys < end) & (keys >= first)


@jit
def _queries_that_see(
    keys, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS: tl.constexpr, CAUSAL: tl.constexpr
):
    """Of each key, the first query that sees it and the one after the last; none for keys past the end."""
    live = keys < length
    first = tl.zeros_like(keys)
    end = first + length
    if HAS_DOCUMENTS:
        end = tl.load(ends_ptr + batch * length + keys, mask=live, other=0)
    if CAUSAL:
        first = keys
        end = tl.minimum(end, keys + window)
    elif HAS_DOCUMENTS:
        first = tl.load(starts_ptr + batch * length + keys, mask=live, other=0)
    return tl.where(live, first, length), tl.where(live, end, 0)


@jit
def _full_tiles(start, stop, full_start, full_stop, BLOCK: tl.constexpr):
    """(tiles before, first position, end) of the tiles from `start` to `stop` that lie between the other two. Those
    before and after are the others."""
    begin = tl.minimum(tl.maximum(tl.cdiv(full_start, BLOCK) * BLOCK, start), tl.cdiv(stop, BLOCK) * BLOCK)
    end = tl.maximum(tl.minimum(full_stop, stop) // BLOCK * BLOCK, begin)
    return (begin - start) // BLOCK, begin, end


@jit
def _other_tile(index, start, before, end, BLOCK: tl.constexpr):
    """The first position of one of the tiles before and after the full ones, which `end` there."""
    return index * BLOCK + tl.where(index < before, start, end - before * BLOCK)


@jit
def _scores_of(product, scaling, softcap, HAS_CAP: tl.constexpr, PTX: tl.constexpr):
    """(scores in base 2; what they were made of, capped where there is a cap)"""
    if HAS_CAP:
        capped = soft_capped(product * scaling, softcap, PTX)
        return _in_base_2(capped), capped
    return product * _in_base_2(scaling), product


@jit
def _in_base_2(scores):
    return scores * 1.4426950408889634


@jit
def _keys_of_tile(row, first, end, length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(start, stop) of the keys that any of the queries from `row` on sees; they start with a tile."""
    start = tl.min(first, axis=0) // BLOCK_N * BLOCK_N
    stop = tl.minimum(row + BLOCK_M, length) if CAUSAL else tl.max(end, axis=0)
    return start, stop


@jit
def _attend(
    key, q, k_ptr, v_ptr, k_row, v_row, queries, first, end, length, width, scaling, softcap, largest, total, out,
    MASKED: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of keys more in the running softmax of each query: (largest score, sum, weighted values)."""
    k = _load_tile(k_ptr, key, k_row, length, width, BLOCK_N, BLOCK_E)
    scores, _ = _scores_of(tl.dot(q, tl.trans(k), input_precision=PRECISION), scaling, softcap, HAS_CAP, PTX)
    if MASKED:
        keys = key + tl.arange(0, BLOCK_N)
        seen = _is_seen(keys[None, :], queries[:, None], first[:, None], end[:, None], CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    reached = tl.where(larger == float("-inf"), 0.0, larger)  # no key of this row yet
    rescale = tl.exp2(largest - reached)
    p = tl.exp2(scores - reached[:, None])
    v = _load_tile(v_ptr, key, v_row, length, width, BLOCK_N, BLOCK_E)
    out = out * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return larger, total * rescale + tl.sum(p, axis=1), out


@jit
def _flash_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    heads, groups, length, width, scaling, softcap, window,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head // groups * k_head
    v_ptr += batch * v_batch + head // groups * v_head
    row = block * BLOCK_M
    queries = row + tl.arange(0, BLOCK_M)
    first, end = _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    q = _load_tile(q_ptr, row, q_row, length, width, BLOCK_M, BLOCK_E)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    live = queries < length
    start, stop = _keys_of_tile(row, first, end, length, CAUSAL, BLOCK_M, BLOCK_N)
    # Of these, the ones that all queries see.
    full_start = tl.max(tl.where(live, first, 0), axis=0)
    full_stop = row + 1 if CAUSAL else tl.min(tl.where(live, end, length), axis=0)
    before, begin, stop_full = _full_tiles(start, stop, full_start, full_stop, BLOCK_N)
    for index in range(before + tl.cdiv(stop - stop_full, BLOCK_N)):
        largest, total, out = _attend(
            _other_tile(index, start, before, stop_full, BLOCK_N), q, k_ptr, v_ptr, k_row, v_row, queries, first, end,
            length, width, scaling, softcap, largest, total, out,
            True, HAS_CAP, CAUSAL, BLOCK_N, BLOCK_E, PRECISION, PTX,
        )  # fmt: skip
    for key in range(begin, stop_full, BLOCK_N):
        largest, total, out = _attend(
            key, q, k_ptr, v_ptr, k_row, v_row, queries, first, end,
            length, width, scaling, softcap, largest, total, out,
            False, HAS_CAP, CAUSAL, BLOCK_N, BLOCK_E, PRECISION, PTX,
        )  # fmt: skip
    total = tl.where(live, total, 1.0)
    out_ptr += batch * out_batch + head * out_head
    _store_tile(out_ptr, row, out_row, length, width, out / total[:, None], BLOCK_M, BLOCK_E)
    tl.store(lse_ptr + (batch * heads + head) * length + queries, largest + tl.log2(total), mask=live)


@jit
def _flash_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    heads, groups, length, width, scaling, softcap, window,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the kernel that follows."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    k_ptr += batch * k_batch + head // groups * k_head
    v_ptr += batch * v_batch + head // groups * v_head
    queries = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = queries < length
    first, end = _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    row = block * BLOCK_M
    q = _load_tile(q_ptr + batch * q_batch + head * q_head, row, q_row, length, width, BLOCK_M, BLOCK_E)
    dout_ptr += batch * dout_batch + head * dout_head
    dout = _load_tile(dout_ptr, row, dout_row, length, width, BLOCK_M, BLOCK_E)
    out = _load_tile(out_ptr + batch * out_batch + head * out_head, row, out_row, length, width, BLOCK_M, BLOCK_E)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    statistics = (batch * heads + head) * length + queries
    tl.store(delta_ptr + statistics, delta, mask=live)
    lse = tl.load(lse_ptr + statistics, mask=live, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    start, stop = _keys_of_tile(row, first, end, length, CAUSAL, BLOCK_M, BLOCK_N)
    for key in range(start, stop, BLOCK_N):
        keys = key + tl.arange(0, BLOCK_N)
        k = _load_tile(k_ptr, key, k_row, length, width, BLOCK_N, BLOCK_E)
        v = _load_tile(v_ptr, key, v_row, length, width, BLOCK_N, BLOCK_E)
        scores, capped = _scores_of(tl.dot(q, tl.trans(k), input_precision=PRECISION), scaling, softcap, HAS_CAP, PTX)
        seen = _is_seen(keys[None, :], queries[:, None], first[:, None], end[:, None], CAUSAL)
        p = tl.exp2(tl.where(seen, scores - lse[:, None], float("-inf")))
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if HAS_CAP:
            ds *= soft_cap_slope(capped, softcap)
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    dq_ptr += batch * dq_batch + head * dq_head
    _store_tile(dq_ptr, row, dq_row, length, width, dq * scaling, BLOCK_M, BLOCK_E)


@jit
def _flash_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    heads, groups, length, width, scaling, softcap, window,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, from all query heads of its group; tiles are keys by queries."""
    row = tl.program_id(0) * BLOCK_N
    key_heads = heads // groups
    batch, key_head = (tl.program_id(1) // key_heads).to(tl.int64), tl.program_id(1) % key_heads
    k = _load_tile(k_ptr + batch * k_batch + key_head * k_head, row, k_row, length, width, BLOCK_N, BLOCK_E)
    v = _load_tile(v_ptr + batch * v_batch + key_head * v_head, row, v_row, length, width, BLOCK_N, BLOCK_E)
    keys = row + tl.arange(0, BLOCK_N)
    first, end = _queries_that_see(keys, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(groups):
        head = key_head * groups + member
        q_base = q_ptr + batch * q_batch + head * q_head
        dout_base = dout_ptr + batch * dout_batch + head * dout_head
        for query in range(tl.min(first, axis=0) // BLOCK_M * BLOCK_M, tl.max(end, axis=0), BLOCK_M):
            queries = query + tl.arange(0, BLOCK_M)
            q = _load_tile(q_base, query, q_row, length, width, BLOCK_M, BLOCK_E)
            dout = _load_tile(dout_base, query, dout_row, length, width, BLOCK_M, BLOCK_E)
            statistics = (batch * heads + head) * length + queries
            lse = tl.load(lse_ptr + statistics, mask=queries < length, other=0.0)
            delta = tl.load(delta_ptr + statistics, mask=queries < length, other=0.0)
            product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            scores, capped = _scores_of(product, scaling, softcap, HAS_CAP, PTX)
            seen = (first[:, None] <= queries[None, :]) & (queries[None, :] < end[:, None])
            p = tl.exp2(tl.where(seen, scores - lse[None, :], float("-inf")))
            dv += tl.dot(p.to(dout.dtype), dout, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            if HAS_CAP:
                ds *= soft_cap_slope(capped, softcap)
            dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk_ptr += batch * dk_batch + key_head * dk_head
    dv_ptr += batch * dv_batch + key_head * dv_head
    _store_tile(dk_ptr, row, dk_row, length, width, dk * scaling, BLOCK_N, BLOCK_E)
    _store_tile(dv_ptr, row, dv_row, length, width, dv, BLOCK_N, BLOCK_E)
