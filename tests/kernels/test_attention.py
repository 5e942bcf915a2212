"""Attention forward and backward as two functions, and under autograd.

The limit is FlashAttention's own: an error at most twice that of plain PyTorch in the same dtype.
"""

import pytest
import torch

from fastllm.kernels.attention import (
    AttentionCase,
    attention,
    attention_backward,
    attention_forward,
    attention_reference,
    choose_backend,
)
from fastllm.kernels.documents import Documents

from . import eager
from .conftest import DTYPES
from .parity import Limit, Setting, assert_parity, check_op, run, wide

# The largest single error of torch's own CPU kernel reaches 2.3 times eager's in dV. With one token dQ and dK are zero
# because two sums cancel, which kernels compute in different orders.
LIMIT = Limit(2.0, 1e-6, eager=2.0, rel_max=2.0 if torch.cuda.is_available() else 2.5, zero=16)
LIMITS = {"y": LIMIT, "dq": LIMIT, "dk": LIMIT, "dv": LIMIT}
# (batch, query heads, key heads, length, head dim)
SHAPES = {
    "one_token": (1, 2, 2, 1, 8),
    "plain": (2, 4, 4, 37, 16),
    "grouped": (2, 6, 2, 61, 32),
    "one_key_head": (1, 5, 1, 64, 64),
    "odd_head": (1, 2, 1, 17, 20),
    "past_a_block": (1, 2, 2, 129, 128),
}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Attention runs library kernels: there is one implementation."""
    return Setting("auto", request.param, device)


def heads(setting: Setting, shape: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """q, k, v as transposed views of rows, as projections give them, and the gradient of the output."""
    batch, q_heads, k_heads, length, width = SHAPES[shape]
    q, k, v = (setting.randn(batch, length, n, width).transpose(1, 2) for n in (q_heads, k_heads, k_heads))
    return {"q": q, "k": k, "v": v}, setting.randn(batch, length, q_heads, width).transpose(1, 2)


def masks(setting: Setting, shape: str, kind: str) -> torch.Tensor | None:
    """A causal mask that also hides the first two positions of each row, but for themselves (left padding)."""
    batch, _, _, length, _ = SHAPES[shape]
    if kind in ("causal", "bidirectional"):
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()
    seen[2:, :2] = False
    seen = seen.expand(batch, 1, length, length)
    return seen if kind == "bool" else torch.zeros_like(seen, dtype=setting.dtype).masked_fill(~seen, float("-inf"))


def check_under_autograd(setting: Setting, shape: str, kind: str, softcap: float = 0.0) -> None:
    """The op and its reference; `kind` is that of the mask."""
    inputs, upstream = heads(setting, shape)
    scaling, mask = 1.3 * inputs["q"].shape[-1] ** -0.5, masks(setting, shape, kind)
    case = AttentionCase(scaling, mask, softcap=softcap, causal=kind != "bidirectional")

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return eager.attention(q, k, v, scaling=scaling, mask=mask, softcap=softcap, causal=case.causal)

    for op in (attention, attention_reference):
        check_op(lambda q, k, v, op=op: op(q, k, v, case), plain, setting, inputs, LIMITS, upstream=(upstream,))


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bool", "additive"])
@pytest.mark.parametrize("shape", SHAPES)
def test_under_autograd(setting, shape, kind):
    check_under_autograd(setting, shape, kind)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_capped_scores_of_a_mask(setting, kind):
    check_under_autograd(setting, "grouped", kind, softcap=1.5)


@pytest.mark.parametrize("softcap", [0.0, 1.5], ids=["plain", "capped"])
def test_a_query_that_sees_nothing_leaves_no_nan(setting, softcap):
    """As padding on the left does: whatever it gives is finite, and so is every gradient."""
    inputs, upstream = heads(setting, "grouped")
    seen = torch.ones(61, 61, dtype=torch.bool, device=setting.device).tril()
    seen[:3] = seen[:, :3] = False
    case = AttentionCase(0.2, seen.expand(2, 1, 61, 61), softcap=softcap)
    found = run(lambda q, k, v: attention(q, k, v, case), inputs, (upstream,))
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("length", [64, 128, 192])
def test_masks_of_every_length_have_finite_gradients(setting, length):
    """Scores far below zero, as of heads that look away: cuDNN's backward fails with a mask at 64 and 192."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(1, 2, length, 64, generator=generator) * 0.1 for _ in range(4))
    q[..., 0], k[..., 0] = 1.0, -960.0
    inputs = {name: t.to(setting.device, setting.dtype) for name, t in zip("qkv", (q, k, v), strict=True)}
    mask = torch.ones(length, length, dtype=torch.bool, device=setting.device).tril()[None, None]
    found = run(
        lambda q, k, v: attention(q, k, v, AttentionCase(0.125, mask)), inputs,
        (upstream.to(setting.device, setting.dtype),),
    )  # fmt: skip
    assert all(value.isfinite().all() for value in found.values())


def check_two_functions(
    setting: Setting, shape: str, mask: torch.Tensor | None, backend: str | None = None, *, causal: bool = True
) -> None:
    """`attention_forward` and `attention_backward`, as the decoder layer calls them."""
    inputs, upstream = heads(setting, shape)
    case = AttentionCase(inputs["q"].shape[-1] ** -0.5, mask, causal=causal)
    backend = backend or choose_backend(*inputs.values(), case)
    result = attention_forward(*inputs.values(), case, backend, needs_backward=True)
    grads = attention_backward(result, upstream, *inputs.values(), case)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return eager.attention(q, k, v, scaling=case.scaling, mask=mask, causal=causal)

    theirs, truth = run(plain, inputs, (upstream,)), run(plain, wide(inputs), (upstream.double(),))
    for name, value in zip(LIMITS, (result.out, *grads), strict=True):
        assert value.dtype == setting.dtype
        assert_parity(f"{backend} {name}", value, theirs[name], truth[name], LIMIT)


@pytest.mark.parametrize("kind", ["causal", "bidirectional", "bool"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_functions(setting, shape, kind):
    check_two_functions(setting, shape, masks(setting, shape, kind), causal=kind != "bidirectional")


# (lengths of the documents in each row, or None; sliding window; soft-capping), for rows of 61 tokens; those of
# NOT_CAUSAL see both ways, as images do.
NARROWED = {
    "packed": ([[1, 30, 7, 23]], 0, 0.0),
    "two_rows": ([[40, 21], [61]], 0, 0.0),
    "window": (None, 9, 0.0),
    "packed_window": ([[17, 44], [3, 58]], 16, 0.0),
    "softcap": (None, 0, 1.5),
    "everything": ([[50, 11]], 20, 2.0),
    "segments": ([[5, 16, 1, 39]], 0, 0.0),
    "rows_of_segments": ([[40, 21], [61]], 0, 0.0),
    "capped_segments": ([[16, 45]], 0, 2.0),
    "capped_rows": (None, 0, 1.5),
}
# With tiles of 64 in which every query sees every key, and others before and behind them: rows of 270 tokens.
LONG = {
    "long_rows": (None, 0, 1.5),
    "long_window": (None, 150, 0.0),
    "long_packed": ([[100, 170]], 0, 0.0),
    "long_packed_window": ([[30, 240]], 140, 0.0),
    "long_segments": ([[20, 160, 90]], 0, 0.0),
}
NOT_CAUSAL = {"segments", "rows_of_segments", "capped_segments", "capped_rows", "long_segments"}
NARROWED_SHAPE = (6, 2, 61, 32)


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    """Position ids [B, S] of rows of documents."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def seen_by_rule(lengths: list[list[int]], window: int, *, causal: bool) -> torch.Tensor:
    """The mask [B, 1, S, S] by the definition, token by token."""
    mask = torch.zeros(len(lengths), 1, sum(lengths[0]), sum(lengths[0]), dtype=torch.bool)
    for row, documents in enumerate(lengths):
        begin = 0
        for length in documents:
            for query in range(begin, begin + length):
                first = max(begin, query - window + 1) if window else begin
                mask[row, 0, query, first : query + 1 if causal else begin + length] = True
            begin += length
    return mask


def narrowed(setting: Setting, name: str, shape: tuple[int, int, int, int] = NARROWED_SHAPE):
    """(case, inputs, upstream gradient, the op as eager attention with a dense mask)."""
    lengths, window, softcap = {**NARROWED, **LONG}[name]
    q_heads, k_heads, length, width = shape
    batch, causal = len(lengths or [0]), name not in NOT_CAUSAL
    q, k, v = (setting.randn(batch, length, n, width).transpose(1, 2) for n in (q_heads, k_heads, k_heads))
    documents = None if lengths is None else Documents.from_position_ids(positions_of(lengths).to(q.device), batch)
    case = AttentionCase(1.1 * width**-0.5, documents=documents, sliding_window=window, softcap=softcap, causal=causal)
    mask = seen_by_rule(lengths or [[length]], window, causal=causal).to(q.device)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return eager.attention(q, k, v, scaling=case.scaling, mask=mask, softcap=softcap)

    upstream = setting.randn(batch, length, q_heads, width).transpose(1, 2)
    return case, {"q": q, "k": k, "v": v}, upstream, plain


def check_narrowed(setting: Setting, name: str, backend: str, shape: tuple[int, int, int, int] = NARROWED_SHAPE):
    """Forward and backward of one backend beside a dense mask."""
    case, inputs, upstream, plain = narrowed(setting, name, shape)
    with setting.active():
        result = attention_forward(*inputs.values(), case, backend, needs_backward=True)
        grads = attention_backward(result, upstream, *inputs.values(), case)
    theirs, truth = run(plain, inputs, (upstream,)), run(plain, wide(inputs), (upstream.double(),))
    for output, value in zip(LIMITS, (result.out, *grads), strict=True):
        assert value.dtype == setting.dtype
        assert_parity(f"{backend} {output}", value, theirs[output], truth[output], LIMIT)


@pytest.mark.parametrize("name", NARROWED)
def test_documents_windows_and_capped_scores(setting, name):
    case, inputs, upstream, plain = narrowed(setting, name)
    for op in (attention, attention_reference):
        check_op(lambda q, k, v, op=op: op(q, k, v, case), plain, setting, inputs, LIMITS, upstream=(upstream,))


def test_a_document_does_not_see_another(setting):
    """Not one bit of a document's output or gradient depends on what stands beside it."""
    case, inputs, upstream, _ = narrowed(setting, "packed")
    first = slice(0, 31)
    found = []
    for scale in (1.0, -3.0):
        changed = {name: t.clone() for name, t in inputs.items()}
        for tensor in changed.values():
            tensor[:, :, 31:] *= scale
        results = run(lambda q, k, v: attention(q, k, v, case), changed, (upstream,))
        found.append({name: t[:, :, first] for name, t in results.items()})
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name


def test_documents_of_position_ids():
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]), 2)
    assert documents is not None and documents.is_packed
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 6, 12] and documents.max_seqlen == 6
    starts, ends = documents.bounds
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5], [0] * 6] and ends.tolist() == [[3, 3, 3, 5, 5, 6], [6] * 6]
    shared = Documents.from_position_ids(torch.tensor([[4, 5, 0, 1]]), 3)
    assert shared is not None and shared.cu_seqlens.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert Documents.from_position_ids(torch.arange(7)[None], 2) is None
    segments = Documents.from_cu_seqlens(torch.tensor([0, 4, 5, 9]))
    assert segments.cu_seqlens.dtype == torch.int32 and segments.lengths == [4, 1, 4]
    assert (segments.max_seqlen, segments.batch, segments.length) == (4, 1, 9)
    rows = Documents.whole_rows(3, 5, torch.device("cpu"))
    assert rows.cu_seqlens.tolist() == [0, 5, 10, 15] and not rows.is_packed


def test_a_mask_and_documents_at_once_are_refused():
    with pytest.raises(ValueError, match="no mask"):
        AttentionCase(1.0, torch.ones(1, 1, 2, 2).bool(), sliding_window=1)
    with pytest.raises(ValueError, match="looks back"):
        AttentionCase(1.0, sliding_window=1, causal=False)
    with pytest.raises(ValueError, match="no function"):
        AttentionCase(1.0, function=lambda q, k, v: v, softcap=1.0)


def test_custom_function(setting):
    """A function of the caller, such as one with soft-capping, takes the place of the built-in kernels."""
    inputs, upstream = heads(setting, "plain")

    def doubled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * eager.attention(q, k, v, scaling=0.1)

    case = AttentionCase(0.1, function=doubled)
    assert choose_backend(*inputs.values(), case) == "autograd"
    result = attention_forward(*inputs.values(), case, "autograd", needs_backward=True)
    grads = attention_backward(result, upstream, *inputs.values(), case)
    expected = run(doubled, inputs, (upstream,))
    for name, value in zip(LIMITS, (result.out, *grads), strict=True):
        assert value.equal(expected[name])


def test_without_backward_nothing_is_kept(setting):
    inputs, _ = heads(setting, "grouped")
    case = AttentionCase(0.2)
    result = attention_forward(*(t.requires_grad_() for t in inputs.values()), case, "autograd", needs_backward=False)
    assert result.saved == () and not result.out.requires_grad


def test_dropout_repeats_in_the_backward(setting):
    """With dropout the output is still linear in v, so <out, g> = <v, dv> holds only for the forward's own mask."""
    inputs, upstream = heads(setting, "grouped")
    case = AttentionCase(0.2, dropout=0.4)
    torch.manual_seed(0)
    result = attention_forward(*inputs.values(), case, choose_backend(*inputs.values(), case), needs_backward=True)
    dropped = result.out.clone()
    _, _, dv = attention_backward(result, upstream, *inputs.values(), case)
    forward, backward = (upstream.double() * dropped.double()).sum(), (inputs["v"].double() * dv.double()).sum()
    size = (upstream.double() * dropped.double()).square().sum().sqrt()
    assert (forward - backward).abs() <= 8 * torch.finfo(setting.dtype).eps * size
    whole = attention(*inputs.values(), AttentionCase(0.2))
    assert (dropped - whole).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("has_mask", [False, True])
def test_gradcheck(has_mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 5, 4, dtype=torch.float64, generator=generator).requires_grad_() for n in (4, 2, 2))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(1) if has_mask else None
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, AttentionCase(0.5, mask)), (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: attention_reference(*qkv, AttentionCase(0.5, mask)), (q, k, v))
