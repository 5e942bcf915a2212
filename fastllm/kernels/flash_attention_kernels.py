"""The three kernels of `flash_attention`, which says what they compute, their shapes and their source.

Each program keeps one block of a head in place, of queries or of keys, and walks over the tiles of the other side that
it has to do with. Bounds grow along a row, so a block's first and last position tell which tiles those are, and in
which every query sees every key; only the others are masked. Positions past the end are taken for the last one: what
they read is 0, and what they find is not written.
"""

from .dispatch import jit, tl
from .soft_cap import soft_cap_slope, soft_capped
from .tensor_tiles import load_rows, load_tile, load_values, store_rows, store_values


@jit
def _keys_seen_by(
    queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS: tl.constexpr, CAUSAL: tl.constexpr
):
    """Of each query, or of one, the first key that it sees and the one after the last."""
    queries = tl.minimum(queries, length - 1)
    first = queries * 0
    end = first + length
    if HAS_DOCUMENTS:
        first = tl.load(starts_ptr + batch * length + queries)
    if CAUSAL:
        first = tl.maximum(first, queries - window + 1)
        end = queries + 1
    elif HAS_DOCUMENTS:
        end = tl.load(ends_ptr + batch * length + queries)
    return first, end


@jit
def _queries_that_see(
    keys, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS: tl.constexpr, CAUSAL: tl.constexpr
):
    """Of each key, or of one, the first query that sees it and the one after the last."""
    keys = tl.minimum(keys, length - 1)
    first = keys * 0
    end = first + length
    if HAS_DOCUMENTS:
        end = tl.load(ends_ptr + batch * length + keys)
    if CAUSAL:
        first = keys
        end = tl.minimum(end, keys + window)
    elif HAS_DOCUMENTS:
        first = tl.load(starts_ptr + batch * length + keys)
    return first, end


@jit
def _scores_of(product, scaling, softcap, HAS_CAP: tl.constexpr, PTX: tl.constexpr):
    """(scores, factor): times the factor they are scores in base 2, which the exponential takes with no step more."""
    if HAS_CAP:
        return soft_capped(product * scaling, softcap, PTX), _in_base_2(1.0)
    return product, _in_base_2(scaling)


@jit
def _in_base_2(scores):
    return scores * 1.4426950408889634


@jit
def flash_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    lse_batch, lse_head, heads, groups, length, scaling, softcap, window,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out and lse of one block of queries."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    key_head = head // groups
    queries = row + tl.arange(0, BLOCK_M)
    start, full_stop = _keys_seen_by(row, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    last = row + BLOCK_M - 1
    full_start, stop = _keys_seen_by(last, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    q = load_rows(q_ptr, batch, head, row, q_batch, q_head, q_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for key in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        k = load_tile(
            k_ptr, batch, key_head, key, k_batch, k_head, k_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT, DESCRIBED
        )  # fmt: skip
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, factor = _scores_of(product, scaling, softcap, HAS_CAP, PTX)
        if (key < full_start) | (key + BLOCK_N > full_stop):
            keys = key + tl.arange(0, BLOCK_N)
            first, end = _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
            seen = (first[:, None] <= keys[None, :]) & (keys[None, :] < end[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1) * factor)
        reached = tl.where(larger == float("-inf"), 0.0, larger)  # no key of this row yet
        rescale = tl.exp2(largest - reached)
        p = tl.exp2(scores * factor - reached[:, None])
        v = load_tile(
            v_ptr, batch, key_head, key, v_batch, v_head, v_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT, DESCRIBED
        )  # fmt: skip
        out = tl.dot(p.to(v.dtype), v, acc=out * rescale[:, None], input_precision=PRECISION)
        total = total * rescale + tl.sum(p, axis=1)
        largest = larger
    out = out / total[:, None]
    store_rows(out_ptr, batch, head, row, out_batch, out_head, out_row, length, out, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT)
    store_values(lse_ptr, batch, head, row, lse_batch, lse_head, length, largest + tl.log2(total), BLOCK_M)


@jit
def flash_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
    lse_batch, lse_head, heads, groups, length, scaling, softcap, window,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta, for the kernel that follows."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    key_head = head // groups
    queries = row + tl.arange(0, BLOCK_M)
    start, full_stop = _keys_seen_by(row, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    last = row + BLOCK_M - 1
    full_start, stop = _keys_seen_by(last, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    out = load_rows(out_ptr, batch, head, row, out_batch, out_head, out_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT)
    dout = load_rows(
        dout_ptr, batch, head, row, dout_batch, dout_head, dout_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT
    )
    q = load_rows(q_ptr, batch, head, row, q_batch, q_head, q_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT)
    lse = load_values(lse_ptr, batch, head, row, lse_batch, lse_head, length, BLOCK_M, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    store_values(delta_ptr, batch, head, row, lse_batch, lse_head, length, delta, BLOCK_M)
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for key in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
        k = load_tile(
            k_ptr, batch, key_head, key, k_batch, k_head, k_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT, DESCRIBED
        )  # fmt: skip
        v = load_tile(
            v_ptr, batch, key_head, key, v_batch, v_head, v_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT, DESCRIBED
        )  # fmt: skip
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        scores, factor = _scores_of(product, scaling, softcap, HAS_CAP, PTX)
        p = tl.exp2(scores * factor - lse[:, None])
        if (key < full_start) | (key + BLOCK_N > full_stop):
            keys = key + tl.arange(0, BLOCK_N)
            first, end = _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
            p = tl.where((first[:, None] <= keys[None, :]) & (keys[None, :] < end[:, None]), p, 0.0)
        if HAS_CAP:
            p *= soft_cap_slope(scores, softcap)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, acc=dq, input_precision=PRECISION)
    store_rows(
        dq_ptr, batch, head, row, dq_batch, dq_head, dq_row, length, dq * scaling, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT
    )


@jit
def flash_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, starts_ptr, ends_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    lse_batch, lse_head, heads, groups, length, scaling, softcap, window, blocks, key_heads_of_all, abreast,
    HAS_DOCUMENTS: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
    PTX: tl.constexpr, WIDTH: tl.constexpr, ALIGNMENT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, from all query heads of its group; tiles are keys by queries."""
    block, index = _longest_first(tl.program_id(0), blocks, key_heads_of_all, abreast)
    row = block * BLOCK_N
    key_heads = heads // groups
    batch, key_head = index // key_heads, index % key_heads
    keys = row + tl.arange(0, BLOCK_N)
    start, full_stop = _queries_that_see(row, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    last = row + BLOCK_N - 1
    full_start, stop = _queries_that_see(last, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
    k = load_rows(k_ptr, batch, key_head, row, k_batch, k_head, k_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT)
    v = load_rows(v_ptr, batch, key_head, row, v_batch, v_head, v_row, length, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    start = start // BLOCK_M * BLOCK_M
    head = key_head * groups
    query = start
    for _ in range(tl.cdiv(stop - start, BLOCK_M) * groups):
        q = load_tile(
            q_ptr, batch, head, query, q_batch, q_head, q_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT, DESCRIBED
        )  # fmt: skip
        dout = load_tile(
            dout_ptr, batch, head, query, dout_batch, dout_head, dout_row, length, WIDTH, BLOCK_M, BLOCK_E, ALIGNMENT,
            DESCRIBED,
        )  # fmt: skip
        lse = load_values(lse_ptr, batch, head, query, lse_batch, lse_head, length, BLOCK_M, DESCRIBED)
        product = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        scores, factor = _scores_of(product, scaling, softcap, HAS_CAP, PTX)
        p = tl.exp2(scores * factor - lse[None, :])
        if (query < full_start) | (query + BLOCK_M > full_stop):
            queries = query + tl.arange(0, BLOCK_M)
            first, end = _queries_that_see(keys, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)
            p = tl.where((first[:, None] <= queries[None, :]) & (queries[None, :] < end[:, None]), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, acc=dv, input_precision=PRECISION)
        if HAS_CAP:  # now, so that the scores need not be kept
            p *= soft_cap_slope(scores, softcap)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        # Read where it is used: registers are short.
        delta = load_values(delta_ptr, batch, head, query, lse_batch, lse_head, length, BLOCK_M, DESCRIBED)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, acc=dk, input_precision=PRECISION)
        is_last = query + BLOCK_M >= stop
        head += is_last.to(tl.int32)
        query = tl.where(is_last, start, query + BLOCK_M)
    dk *= scaling
    store_rows(dk_ptr, batch, key_head, row, dk_batch, dk_head, dk_row, length, dk, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT)
    store_rows(dv_ptr, batch, key_head, row, dv_batch, dv_head, dv_row, length, dv, WIDTH, BLOCK_N, BLOCK_E, ALIGNMENT)


@jit
def _longest_first(program, blocks, heads, abreast):
    """(block, head) of a program: of so many heads `abreast` the first blocks, which take longest, then the next."""
    first = program // (abreast * blocks) * abreast
    count = tl.minimum(heads - first, abreast)
    within = program - first * blocks
    return within // count, first + within % count
