"""Language-model head and cross-entropy in one op, without the [T, V] logits.

    z = cap * tanh(scale * (h W^T + b) / cap)      (without a cap: z = scale * (h W^T + b))
    nll_t = logsumexp(z_t) - z_t[label_t],         0 where label_t is the ignore index

Rows go through the head in chunks of at least 1,024: in smaller ones re-reading W costs more than the product. Each
row's gradient (softmax - onehot) W depends on that row's upstream gradient by a factor only, so it is computed in the
forward, from the logits at hand, and scaled in the backward: no logits are computed twice. It stays unscaled and fp32
in between, so it neither underflows in fp16 nor rounds twice; its product may be one in FP8 (fp8_head.py). Rows with an
ignored label can be left out altogether: `LabelCount` brings their number to the host while the decoder layers run, so
nothing waits for it.

Shapes: hidden [T, D]; labels [T], already aligned with the rows (shifted); head: one `Projection` of weight [V, D].
Dtypes: logits in the compute dtype, softmax and loss in fp32; gradients of the head accumulate over chunks in fp32.
Source: the chunking follows Hsu et al., "Liger Kernel", arXiv 2410.10989, section 3.2; softcap: Gemma 2, arXiv
2408.00118, section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._errors import reject_unknown
from .activation import exp_of
from .dispatch import compiles_to_ptx, compute_dtype, jit, launch_on, no_autocast, tl, use_triton
from .fp8 import LARGEST, to_e4m3
from .fp8_head import LEAST_ENTRY, Fp8Head, LogitGrads, serves_head
from .lora import PreparedGroup, ProjectionGroup, prepare, project
from .products import add_matmul, matmul_fp32
from .soft_cap import soft_cap_slope, soft_capped

IGNORE_INDEX = -100
MIN_CHUNK_ROWS = 1024
_CHUNK_ELEMENTS = 2**27
# Ignored rows are left out if no more than this part is kept: to pick rows and to put their gradients back moves as
# much as a fiftieth of the product.
_MOST_KEPT = 0.98
# Logits of a chunk where memory counts more than time.
_FEW_ELEMENTS = 2**25
_BLOCK = 4096


class TokenLosses(NamedTuple):
    """Per row: `nll` fp32; `entropy` fp32 and `is_top1` bool of the predicted distribution, or None if not asked for.
    All are zero where the label is ignored; only `nll` carries gradients."""

    nll: torch.Tensor
    entropy: torch.Tensor | None
    is_top1: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a family does to its logits before the softmax: multiply by `scale`, then cap at `softcap` (0: no cap)."""

    scale: float = 1.0
    softcap: float = 0.0

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """The definition, differentiable: of the head's output, in at least fp32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return self.softcap * torch.tanh(wide / self.softcap) if self.softcap else wide


PLAIN_LOGITS = LogitTransform()


class LabelCount:
    """The number of labels that are not ignored, on its way to the host.

    Create it before the decoder layers are launched and call `get` when they are: the copy is behind the queue's head
    by then, and the GPU has the layers' work queued while the host waits.
    """

    def __init__(self, labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> None:
        count = (labels != ignore_index).sum()
        self._ready = None
        if labels.is_cuda:
            self._host = torch.empty((), dtype=count.dtype, pin_memory=True)
            self._host.copy_(count, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._host = count

    def get(self) -> int:
        if self._ready is not None:
            self._ready.synchronize()
        return int(self._host)


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: ProjectionGroup,
    labels: torch.Tensor,
    *,
    num_items: torch.Tensor | float | None = None,
    transform: LogitTransform = PLAIN_LOGITS,
    ignore_index: int = IGNORE_INDEX,
    valid_rows: int | None = None,
    spares_memory: bool = False,
    fp8_gradient: bool = False,
) -> torch.Tensor:
    """Sum of the rows' negative log-likelihoods over `num_items` (the number of labels that are not ignored).

    `valid_rows`, that number on the host, lets ignored rows be skipped. Gradients flow to hidden and to each trainable
    tensor of the head (weight, bias, LoRA). A batch without labels gives an exact zero with zero gradients.
    `spares_memory` takes the rows of a short batch in smaller chunks, but in deterministic mode, where bits count.
    `fp8_gradient` asks for the hidden states' in FP8, of long batches and through a head without `head_obstacle`.
    """
    chunk = chunk_rows(head.out_features)
    if spares_memory and hidden.shape[0] <= MIN_CHUNK_ROWS and not torch.are_deterministic_algorithms_enabled():
        chunk = min(chunk, few_rows(head.out_features))
    total = _LinearNll.apply(
        hidden, head, labels, transform, ignore_index, valid_rows, True, (), chunk, fp8_gradient, *head.parameters()
    )[0]
    if num_items is None:
        num_items = (labels != ignore_index).sum()
    return total / (num_items + (num_items == 0))  # without labels: 0 / 1


def linear_token_losses(
    hidden: torch.Tensor,
    head: ProjectionGroup,
    labels: torch.Tensor,
    *,
    transform: LogitTransform = PLAIN_LOGITS,
    ignore_index: int = IGNORE_INDEX,
    valid_rows: int | None = None,
    statistics: Sequence[str] = (),
    fp8_gradient: bool = False,
) -> TokenLosses:
    """The loss of each row [T], with `statistics` from {"entropy", "is_top1"}; nll is differentiable row by row.
    `fp8_gradient` as in `linear_cross_entropy`."""
    reject_unknown("statistics of linear_token_losses", statistics, TokenLosses._fields[1:])
    chunk = chunk_rows(head.out_features)
    return TokenLosses(
        *_LinearNll.apply(
            hidden, head, labels, transform, ignore_index, valid_rows, False, tuple(statistics), chunk, fp8_gradient,
            *head.parameters(),
        )
    )  # fmt: skip


def token_losses_reference(
    logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform, ignore_index: int
) -> TokenLosses:
    """The definition, from the head's raw output `[T, V]`."""
    wide = transform.of(logits)
    log_probs = torch.log_softmax(wide, dim=-1)
    ignored = labels == ignore_index
    target = log_probs.gather(-1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1).masked_fill(ignored, 0.0)
        is_top1 = (wide.argmax(-1) == labels) & ~ignored
    return TokenLosses((-target).masked_fill(ignored, 0.0), entropy, is_top1)


def chunk_rows(vocab_size: int) -> int:
    """Rows of a chunk: about 2^27 logits, never fewer than 1,024 rows."""
    return max(MIN_CHUNK_ROWS, _CHUNK_ELEMENTS // vocab_size // 256 * 256)


def few_rows(vocab_size: int) -> int:
    """Rows of a small chunk: about 2^25 logits."""
    return max(_FEW_ELEMENTS // vocab_size // 64 * 64, 64)


def _token_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    transform: LogitTransform,
    ignore_index: int,
    statistics: tuple[str, ...],
    *,
    write_grad: bool,
    row_scale: torch.Tensor | None = None,
    in_fp8: LogitGrads | None = None,
) -> TokenLosses:
    """Losses of one chunk; with `write_grad` d(row_scale * nll)/d(logits) goes to `in_fp8`, else over the logits."""
    rows, vocab = logits.shape
    if not use_triton(logits):
        with torch.set_grad_enabled(write_grad):
            wide = logits.dtype if in_fp8 is None else torch.promote_types(logits.dtype, torch.float32)
            leaf = logits.detach().to(wide).requires_grad_(write_grad)
            losses = token_losses_reference(leaf, labels, transform, ignore_index)
        if write_grad:
            upstream = torch.ones_like(losses.nll) if row_scale is None else row_scale.to(losses.nll.dtype)
            (grads,) = torch.autograd.grad(losses.nll, leaf, upstream)
            if in_fp8 is None:
                logits.copy_(grads)
            else:
                in_fp8.fill(grads, labels, ignore_index)
        return losses._replace(nll=losses.nll.detach())
    labels = labels.contiguous()  # the kernel reads one number a row; a gradient of a sum has stride 0
    row_scale = None if row_scale is None else row_scale.contiguous()
    nll, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    is_top1 = torch.empty(rows, dtype=torch.bool, device=logits.device)
    values, scales, of_labels, values_stride = logits, nll, nll, 0
    if in_fp8 is not None:
        values, scales, of_labels = in_fp8.others.values.view(torch.uint8), in_fp8.others.scales, in_fp8.of_labels
        values_stride = values.stride(0)
    if rows:
        with launch_on(logits):
            _cross_entropy_kernel[(rows,)](
                logits, labels, nll if row_scale is None else row_scale, nll, entropy, is_top1, values, scales,
                of_labels, logits.stride(0), values_stride, vocab, ignore_index, transform.scale, transform.softcap,
                HAS_SOFTCAP=transform.softcap != 0, HAS_ENTROPY="entropy" in statistics,
                HAS_TOP1="is_top1" in statistics, WRITE_GRAD=write_grad, HAS_ROW_SCALE=row_scale is not None,
                IN_FP8=in_fp8 is not None, LARGEST=LARGEST, LEAST_ENTRY=LEAST_ENTRY, PTX=compiles_to_ptx(logits),
                BLOCK=_BLOCK, num_warps=16 if statistics else 8,  # statistics take registers
            )  # fmt: skip
    return TokenLosses(nll, entropy, is_top1)


@jit
def _capped(z, scale, softcap, HAS_SOFTCAP: tl.constexpr, PTX: tl.constexpr):
    """The transformed logit."""
    z = z * scale
    if HAS_SOFTCAP:
        z = soft_capped(z, softcap, PTX)
    return z


@jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, row_scale_ptr, nll_ptr, entropy_ptr, top1_ptr, values_ptr, scales_ptr, of_labels_ptr,
    stride, values_stride, vocab, ignore_index, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_TOP1: tl.constexpr, WRITE_GRAD: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, IN_FP8: tl.constexpr, LARGEST: tl.constexpr, LEAST_ENTRY: tl.constexpr,
    PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    grads_ptr = values_ptr + row * values_stride if IN_FP8 else row_ptr
    label = tl.load(labels_ptr + row)
    cols = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(top1_ptr + row, 0)
        if WRITE_GRAD:
            zeros = tl.zeros((BLOCK,), dtype=grads_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(grads_ptr + start + cols, zeros, mask=start + cols < vocab)
            if IN_FP8:
                tl.store(scales_ptr + row, 0.0)
                tl.store(of_labels_ptr + row, 0.0)
    else:
        # Read before the reductions below, whose barriers keep it ahead of the gradient that overwrites the logits. A
        # label that is none makes the loss NaN, and touches no other row.
        is_label = (label >= 0) & (label < vocab)
        target = tl.load(row_ptr + label, mask=is_label, other=float("nan")).to(tl.float32)
        target = _capped(target, scale, softcap, HAS_SOFTCAP, PTX)
        top = -float("inf")
        top_before_label = -float("inf")
        top_other = -float("inf")
        total = 0.0
        weighted = 0.0
        for start in range(0, vocab, BLOCK):
            live = start + cols < vocab
            raw = tl.load(row_ptr + start + cols, mask=live, other=0.0).to(tl.float32)
            z = _capped(raw, scale, softcap, HAS_SOFTCAP, PTX)
            z = tl.where(live, z, -float("inf"))
            new_top = tl.maximum(top, tl.max(z, axis=0))
            rescale = tl.exp(top - new_top)
            e = exp_of(z - new_top, PTX)
            total = total * rescale + tl.sum(e, axis=0)
            if HAS_ENTROPY:
                weighted = weighted * rescale + tl.sum(tl.where(live, e * z, 0.0), axis=0)
            if HAS_TOP1:  # the first of equal maxima counts, as in argmax
                before = tl.where(start + cols < label, z, -float("inf"))
                top_before_label = tl.maximum(top_before_label, tl.max(before, axis=0))
            if IN_FP8:
                top_other = tl.maximum(top_other, tl.max(tl.where(start + cols == label, -float("inf"), z), axis=0))
            top = new_top
        lse = top + tl.log(total)
        tl.store(nll_ptr + row, lse - target)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, lse - weighted / total)
        if HAS_TOP1:
            tl.store(top1_ptr + row, ((target >= top) & (target > top_before_label)).to(tl.int8))
        if WRITE_GRAD:
            g = scale
            if HAS_ROW_SCALE:
                g = scale * tl.load(row_scale_ptr + row).to(tl.float32)
            of_label = (tl.exp(target - lse) - 1.0) * g
            if HAS_SOFTCAP:
                of_label *= soft_cap_slope(target, softcap)
            factor = g
            if IN_FP8:
                # Of softmax's part. A soft cap's slope, at most one, may leave some of the range unused.
                largest = tl.exp(top_other - lse) * tl.abs(g)
                factor *= tl.where(largest < LEAST_ENTRY, 0.0, LARGEST / largest)
                tl.store(scales_ptr + row, largest / LARGEST)
                tl.store(of_labels_ptr + row, of_label)
            pieces = tl.cdiv(vocab, BLOCK)
            for piece in range(pieces):  # from the end, which the cache still has
                start = (pieces - 1 - piece) * BLOCK
                live = start + cols < vocab
                raw = tl.load(row_ptr + start + cols, mask=live, other=0.0).to(tl.float32)
                z = _capped(raw, scale, softcap, HAS_SOFTCAP, PTX)
                grad = exp_of(z - lse, PTX) * factor
                if HAS_SOFTCAP:
                    grad *= soft_cap_slope(z, softcap)
                values = to_e4m3(grad, PTX) if IN_FP8 else grad.to(logits_ptr.dtype.element_ty)
                tl.store(grads_ptr + start + cols, values, mask=live)
            tl.debug_barrier()  # the label's, after what the loop wrote in its place
            value = 0 if IN_FP8 else of_label.to(logits_ptr.dtype.element_ty)
            tl.store(grads_ptr + label, value, mask=is_label)


class _HeadGradients:
    """fp32 sums, over chunks, of the gradients of the head's trainable tensors."""

    def __init__(self, head: ProjectionGroup, needs: Sequence[bool]) -> None:
        projection = head.projections[0]
        self.scaling = projection.scaling
        self.sums: list[torch.Tensor | None] = [
            torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
            if needed and p is not None else None
            for needed, p in zip(needs, projection.parameters(), strict=True)
        ]  # fmt: skip

    def add(
        self, prepared: PreparedGroup, dlogits: torch.Tensor, hidden: torch.Tensor, low_rank: torch.Tensor | None
    ) -> None:
        dw, dbias, da, db = self.sums
        rank = prepared.group.projections[0].rank
        if dw is not None:
            add_matmul(dw, dlogits.t(), hidden)
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=dbias.dtype)
        if da is not None:
            assert prepared.b is not None
            da += matmul_fp32((dlogits @ prepared.b[:, :rank]).t(), hidden, factor=self.scaling)
        if db is not None:
            assert low_rank is not None
            db += matmul_fp32(dlogits.t(), low_rank[:, :rank])


class _LinearNll(torch.autograd.Function):
    """Per-row losses, or their sum. Gradients of hidden rows come from the forward; those of the head come from the
    forward for the sum (one upstream factor for all rows) and from recomputed logits for per-row losses."""

    @staticmethod
    def forward(
        ctx, hidden, head, labels, transform, ignore_index, valid_rows, as_sum, statistics, chunk, fp8_gradient,
        *parameters,
    ):  # fmt: skip
        if head.has_dropout:
            raise ValueError("dropout on a head is not part of this op: it would drop the inputs of the loss")
        needs_hidden, needs_head = ctx.needs_input_grad[0], ctx.needs_input_grad[10:]
        rows, dtype = hidden.shape[0], compute_dtype(hidden, head.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        kept, count = None, rows
        if valid_rows is not None and valid_rows < _MOST_KEPT * rows:
            count = valid_rows
            kept = torch.argsort(labels == ignore_index, stable=True)[:count]
        nll = torch.empty(count, dtype=wide, device=hidden.device)
        entropy = torch.empty(count, dtype=wide, device=hidden.device) if "entropy" in statistics else None
        is_top1 = torch.empty(count, dtype=torch.bool, device=hidden.device) if "is_top1" in statistics else None
        dhidden = torch.empty(count, hidden.shape[1], dtype=wide, device=hidden.device) if needs_hidden else None
        head_now = as_sum and any(needs_head)
        sums = _HeadGradients(head, needs_head) if head_now else None
        with no_autocast(hidden.device.type):
            prepared = prepare(head, dtype)
            is_fp8 = fp8_gradient and needs_hidden and serves_head(head, count)
            fp8_head = Fp8Head(prepared.weights[0][1]) if is_fp8 else None
            for part in _chunks(count, chunk):
                picked = part if kept is None else kept[part]
                h, y = hidden[picked].to(dtype), labels[picked]
                logits, low_rank, _ = project(prepared, h)
                in_fp8 = None if fp8_head is None else LogitGrads.empty(logits.shape[0], logits.shape[1], logits.device)
                losses = _token_losses(
                    logits, y, transform, ignore_index, statistics, write_grad=needs_hidden or head_now, in_fp8=in_fp8
                )
                for target, value in zip((nll, entropy, is_top1), losses, strict=True):
                    if target is not None and value is not None:
                        target[part] = value
                if fp8_head is not None and in_fp8 is not None and dhidden is not None:
                    fp8_head.hidden_grad(in_fp8, y, ignore_index, out=dhidden[part])
                elif dhidden is not None:
                    dhidden[part] = _hidden_grad(prepared, logits)
                if sums is not None:
                    sums.add(prepared, logits, h, low_rank)
        ctx.save_for_backward(hidden, labels, kept, dhidden, *(sums.sums if sums else ()), *parameters)
        ctx.head, ctx.transform, ctx.ignore_index, ctx.dtype = head, transform, ignore_index, dtype
        ctx.as_sum, ctx.num_sums, ctx.chunk = as_sum, len(sums.sums) if sums else 0, chunk
        if as_sum:
            return (nll.sum(),)
        outputs = tuple(_spread(value, kept, rows) for value in (nll, entropy, is_top1))
        ctx.mark_non_differentiable(*(value for value in outputs[1:] if value is not None))
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, labels, kept, dhidden, *rest = ctx.saved_tensors
        sums, needs_head = rest[: ctx.num_sums], ctx.needs_input_grad[10:]
        per_row = grad if ctx.as_sum else (grad if kept is None else grad[kept])[:, None]
        grad_hidden = None
        if dhidden is not None:
            grad_hidden = _spread(_product(dhidden, per_row, hidden.dtype), kept, hidden.shape[0])
        head_grads: list[torch.Tensor | None] = [None] * len(needs_head)
        if any(needs_head):
            if not ctx.as_sum:
                sums = _head_gradients_again(ctx, hidden, labels, kept, per_row[:, 0], needs_head)
            head_grads = [
                None if total is None else _product(total, grad, p.dtype) if ctx.as_sum else total.to(p.dtype)
                for total, p in zip(sums, ctx.head.parameters(), strict=True)
            ]
        return grad_hidden, *[None] * 9, *head_grads


def _product(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total * factor, rounded to `dtype` on the way: a wide product of a head's gradient would be the step's peak."""
    return torch.mul(total, factor, out=torch.empty(total.shape, dtype=dtype, device=total.device))


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _hidden_grad(prepared: PreparedGroup, dlogits: torch.Tensor) -> torch.Tensor:
    """dlogits W plus the low-rank path, fp32."""
    grad = matmul_fp32(dlogits, prepared.weights[0][1])
    if prepared.a is not None and prepared.b is not None:
        grad += matmul_fp32(dlogits @ prepared.b, prepared.a)
    return grad


def _head_gradients_again(
    ctx,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    kept: torch.Tensor | None,
    per_row: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    sums = _HeadGradients(ctx.head, needs)
    with no_autocast(hidden.device.type):
        prepared = prepare(ctx.head, ctx.dtype)
        for part in _chunks(per_row.shape[0], ctx.chunk):
            picked = part if kept is None else kept[part]
            h, y = hidden[picked].to(ctx.dtype), labels[picked]
            logits, low_rank, _ = project(prepared, h)
            _token_losses(logits, y, ctx.transform, ctx.ignore_index, (), write_grad=True, row_scale=per_row[part])
            sums.add(prepared, logits, h, low_rank)
    return sums.sums


def _spread(value: torch.Tensor | None, kept: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """Rows `kept` of a tensor that is zero elsewhere."""
    if value is None or kept is None:
        return value
    return value.new_zeros(rows, *value.shape[1:]).index_copy_(0, kept, value)
