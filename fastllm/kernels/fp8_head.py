"""The gradient of hidden states through a frozen language-model head, with its large product in FP8.

    dH = G W = (G - G_L) W + diag(g_L) W[labels]       G = d(loss) / d(logits),  g_L its entries at the labels

A row's entry at its label, p - 1, is as large as all others together, so it stays out of the product, in fp32. The
others are rounded to e4m3, with a scale for each row by which the largest of them is exact, and zero below 2^-19 of it.
Both parts read the same W, rounded to e4m3 with one scale, as the values of a head are of one magnitude: over many
tokens of a trained model they all but cancel, and what W is off by has to cancel with them. Its transpose is made in
each call, since a frozen weight may still be edited in place. The logits and the loss are not touched.

Off by 3.6 % (L2 norm, as `fp8.py` derives it).

Shapes: G [T, V], W [V, D], labels [T], dH [T, D].  Dtypes: those of fp8.py; g_L and dH in fp32 or wider.
Source: the splitting is ours; scales and rounding as in fp8.py.
"""

from dataclasses import dataclass

import torch

from .dispatch import compiles_to_ptx, jit, launch_on, tl, triton, use_triton
from .fp8 import (
    DTYPE,
    LARGEST,
    MULTIPLE,
    Fp8Matrix,
    e4m3_value,
    largest_magnitude,
    magnitude_bits,
    row_scale,
    row_scales_reference,
    scaled_matmul,
    to_e4m3,
)
from .projections import ProjectionGroup

# Rows from which the product spares more than making the transpose of W takes.
_LEAST_ROWS = 2048
_TILE = 64
_BLOCK = 1024
# Rows whose other entries are all smaller are zero but at their labels: what scales up less would overflow in fp32.
LEAST_ENTRY = 1e-35


@dataclass(frozen=True, slots=True, eq=False)
class LogitGrads:
    """G of some rows: `others`, which is zero at the labels, and `of_labels` fp32 [T]."""

    others: Fp8Matrix
    of_labels: torch.Tensor

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device) -> "LogitGrads":
        of_labels = torch.empty(rows, dtype=torch.float32, device=device)
        return cls(Fp8Matrix.empty(rows, vocab, device), of_labels)

    def fill(self, grads: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> None:
        """From G `[T, V]`: the definition, whose like is part of the kernel of the cross-entropy."""
        at_labels = _rows_of_head(labels, ignore_index)[:, None]
        self.of_labels.copy_(grads.gather(1, at_labels)[:, 0])
        others = grads.float().scatter(1, at_labels, 0.0)
        largest = others.abs().amax(1)
        reciprocals = torch.where(largest < LEAST_ENTRY, torch.zeros_like(largest), LARGEST / largest)
        self.others.scales.copy_(largest / LARGEST)
        self.others.values.copy_((others * reciprocals[:, None]).to(DTYPE))


class Fp8Head:
    """A head's weight `[V, D]`, and its transpose in FP8."""

    def __init__(self, weight: torch.Tensor) -> None:
        weight = weight.detach()
        self._weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self._transposed = quantize_transposed(self._weight)

    def hidden_grad(self, grads: LogitGrads, labels: torch.Tensor, ignore_index: int, *, out: torch.Tensor) -> None:
        """Write G W [T, D] to `out`, in fp32 or wider."""
        product = scaled_matmul(grads.others, self._transposed, self._weight.dtype)
        scales = self._transposed.scales
        if not use_triton(product):
            rows = self._weight[_rows_of_head(labels, ignore_index)]
            rounded = (rows.float() / scales[0]).to(DTYPE).float() * scales[0]
            torch.addcmul(product, grads.of_labels[:, None], rounded, out=out)
            return
        columns = out.shape[1]
        with launch_on(out):
            _add_label_rows_kernel[(out.shape[0], triton.cdiv(columns, _BLOCK))](
                product, grads.of_labels, labels.contiguous(), self._weight, scales, out, columns,
                self._weight.shape[0], product.stride(0), self._weight.stride(0), out.stride(0), BLOCK=_BLOCK,
                PTX=compiles_to_ptx(product), num_warps=4,
            )  # fmt: skip


def head_obstacle(head: ProjectionGroup) -> str | None:
    """Why the gradient can't go through the head in FP8, or None."""
    (projection,) = head.projections
    if not isinstance(projection.weight, torch.Tensor):
        return "the head is 4-bit"
    if any(parameter is not None and parameter.requires_grad for parameter in projection.parameters()):
        return "the head is trained"
    if projection.rank:
        return "the head has an adapter"
    if any(size % MULTIPLE for size in projection.weight.shape):
        return f"the head has a size that is no multiple of {MULTIPLE}"
    return None


def serves_head(head: ProjectionGroup, rows: int) -> bool:
    """Whether the gradient of so many rows can go through the head in FP8, and gains by it."""
    return rows >= _LEAST_ROWS and head_obstacle(head) is None


def quantize_transposed(weight: torch.Tensor) -> Fp8Matrix:
    """The transpose [D, V] of a weight `[V, D]`, with unit stride along D, in FP8 with one scale for all rows."""
    rows, columns = weight.shape
    out = Fp8Matrix.empty(columns, rows, weight.device)
    largest = largest_magnitude(weight)
    if not use_triton(weight):
        out.scales.copy_(row_scales_reference(largest).expand(columns))
        out.values.copy_((weight.t().float() / out.scales[:, None]).to(DTYPE))
        return out
    with launch_on(weight):
        _quantize_transposed_kernel[(triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))](
            weight, largest, out.values.view(torch.uint8), out.scales, rows, columns, weight.stride(0),
            out.values.stride(0), TILE=_TILE, PTX=compiles_to_ptx(weight), num_warps=4,
        )  # fmt: skip
    return out


def _rows_of_head(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The labels, the first row for what is ignored: its gradient is zero."""
    return labels.masked_fill(labels == ignore_index, 0)


@jit
def _quantize_transposed_kernel(
    weight_ptr, largest_ptr, values_ptr, scales_ptr, rows, columns, weight_stride, values_stride,
    TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    scale, reciprocal = row_scale(magnitude_bits(tl.load(largest_ptr)))
    live = (i < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(weight_ptr + i.to(tl.int64)[:, None] * weight_stride + j[None, :], mask=live, other=0.0)
    values = tl.trans(to_e4m3(tile.to(tl.float32) * reciprocal, PTX))
    live = (j < columns)[:, None] & (i < rows)[None, :]
    tl.store(values_ptr + j.to(tl.int64)[:, None] * values_stride + i[None, :], values, mask=live)
    if tl.program_id(0) == 0:
        tl.store(scales_ptr + j, tl.zeros((TILE,), tl.float32) + scale, mask=j < columns)


@jit
def _add_label_rows_kernel(
    product_ptr, of_labels_ptr, labels_ptr, weight_ptr, scales_ptr, out_ptr, columns, vocab,
    product_stride, weight_stride, out_stride, BLOCK: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < columns
    label = tl.load(labels_ptr + row)
    label = tl.where((label >= 0) & (label < vocab), label, 0).to(tl.int64)  # of another the entry is zero, or NaN
    scale = tl.load(scales_ptr)
    weight = tl.load(weight_ptr + label * weight_stride + cols, mask=live, other=0.0).to(tl.float32)
    weight = e4m3_value(to_e4m3(weight / scale, PTX)) * scale
    product = tl.load(product_ptr + row * product_stride + cols, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, product + tl.load(of_labels_ptr + row) * weight, mask=live)
