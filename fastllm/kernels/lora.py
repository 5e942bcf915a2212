"""Linear projections of one input with LoRA, computed together, with a hand-written backward.

For each projection i of a group that shares the input x:

    y_i = x W_i^T + bias_i + dropout_i(x) (s_i A_i)^T B_i^T

The A matrices are stacked, so x is read once for all of them. Where W has to be written to a buffer anyway (4-bit
weights, or a change of dtype), and where that costs less than it spares, the low-rank path rides in the same matrix
product, exactly, by extending the inner dimension:

    forward    Y  = [x | x A^T] [W | B]^T          backward   dX = [dY | dY B] [W ; A]

with A = stack(s_i A_i) and B = blockdiag(B_i): one buffer [N + E, K + E] holds W, B and A. Elsewhere both terms are
added in fp32. A sum of two that are rounded to 16 bits would lose most of the low-rank one: that of the first steps is
a thousandth of the other, less than half a unit in its last place. A group of frozen weights may ask for FP8 (fp8.py)
in its two large products, which take the low-rank path in as well (fp8_low_rank.py).

Shapes: x [T, K], y [T, N] with N = sum of out features; A_i [r_i, K], B_i [N_i, r_i]; E = sum of ranks, padded.
Dtypes: matrix products in the compute dtype with fp32 accumulation; gradients of parameters accumulate in fp32 and
take the parameter's dtype.
Source: Hu et al., "LoRA", arXiv 2106.09685, section 4.1; scaling of rsLoRA: arXiv 2312.03732.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .copy_lora import copy_with_product, serves_rows
from .dispatch import compute_dtype, no_autocast, rows_of
from .fp8 import Fp8Weight
from .fp8_low_rank import Term, fp8_input_grad, fp8_linear
from .kept_weights import KeptForm, KeptWeights
from .low_rank_fill import fill_low_rank
from .nf4 import Nf4Weight, dequantize_nf4
from .products import add_matmul, matmul_fp32
from .projections import PARAMETERS_PER_PROJECTION, Projection, ProjectionGroup
from .row_copy import copy_rows
from .weight_forms import fp8_weights, joined_weights
from .weights_in_turn import WeightsInTurn, spares_memory_in_turn


@dataclass(slots=True, eq=False)
class PreparedGroup:
    """The matrices of one pass over a group, in the compute dtype.

    `weights` are (columns of y, [n, K]) pairs; `a` [E, K] is stacked and scaled, `b` [N, E] block-diagonal; `joined` is
    the buffer [N + E, K + E] that holds them all where the extended product is possible. `fp8` [N, K] stands for
    `weights` in a group that asks for it, and `in_turn` for `weights` and `joined` where they are dequantised in turn.
    """

    group: ProjectionGroup
    weights: list[tuple[slice, torch.Tensor]]
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    joined: torch.Tensor | None
    fp8: Fp8Weight | None = None
    in_turn: WeightsInTurn | None = None


class PreparedGroups:
    """The groups of a layer, each an attribute of `owner`, prepared when first asked for. `shared` keeps them for the
    backward that follows a recomputation; otherwise they are made anew, so that one group's buffer lives at a time.
    `kept` holds dequantised weights from pass to pass. With `in_turn` the weights of a group that is not kept are
    dequantised one after the other where that spares memory. `rows`: of the inputs."""

    def __init__(
        self,
        owner: Any,
        dtype: torch.dtype,
        kept: KeptWeights | None = None,
        *,
        rows: int,
        shared: bool,
        in_turn: bool = False,
    ) -> None:
        self._owner, self._dtype, self._kept, self._rows, self._shared = owner, dtype, kept, rows, shared
        self._in_turn = in_turn
        self._made: dict[str, PreparedGroup] = {}

    def take(self, name: str, *, last: bool = False) -> PreparedGroup:
        """The group called so; nobody asks for it again after the `last` time."""
        made = self._made.pop(name, None)
        if made is None:
            group: ProjectionGroup = getattr(self._owner, name)
            kept = None if self._kept is None else self._kept.form(name)
            in_turn = self._in_turn and kept is None and spares_memory_in_turn(group, self._rows)
            made = prepare(group, self._dtype, rows=self._rows, kept=kept, in_turn=in_turn)
        if self._shared and not last:
            self._made[name] = made
        return made


def prepare(
    group: ProjectionGroup,
    dtype: torch.dtype,
    *,
    rows: int = 0,
    kept: KeptForm | None = None,
    in_turn: bool = False,
) -> PreparedGroup:
    """Dequantise or cast the weights of a group, and lay out A and B beside them, for inputs of so many rows.

    `kept` holds the buffer with the dequantised weights from call to call; everything else is written anew. With
    `in_turn`, for a group whose weights are all 4-bit and not kept, they are dequantised when they are multiplied.
    """
    projections = group.projections
    n, k, e = group.out_features, group.in_features, group.extension
    device = projections[0].weight.device
    dense = [p.weight.detach() for p in projections if isinstance(p.weight, torch.Tensor) and p.weight.dtype == dtype]
    a = b = joined = fp8 = None
    is_joined = not in_turn and (len(dense) < len(projections) or _pays_to_join(group, dtype, device, rows))
    if group.is_fp8 or not is_joined:
        if group.is_fp8:
            weights, fp8 = [], fp8_weights(group, dtype, device, kept)
        else:
            weights = [] if in_turn else list(zip(group.row_slices, dense, strict=True))
        if e:
            a, b = (torch.empty(shape, dtype=dtype, device=device) for shape in ((e, k), (n, e)))
    else:
        joined = joined_weights(group, dtype, device, kept)
        weights = [(slice(0, n), joined[:n, :k])]
        if e:
            a, b = joined[n:, :k], joined[:n, k:]
    if a is not None and b is not None:
        fill_low_rank(group, a, b)
    bias = None
    if any(p.bias is not None for p in projections):
        parts = [
            torch.zeros(p.out_features, dtype=dtype, device=device) if p.bias is None else p.bias for p in projections
        ]
        bias = torch.cat([part.detach().to(dtype) for part in parts]) if len(parts) > 1 else parts[0].detach().to(dtype)
    return PreparedGroup(group, weights, a, b, bias, joined, fp8, WeightsInTurn(group, dtype, b) if in_turn else None)


def project(
    prepared: PreparedGroup,
    x: torch.Tensor,
    *,
    extended: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]:
    """The joined output of rows `x [T, K]`, outside autograd.

    `extended` is the buffer of `input_buffer` whose left part x is; its right part is overwritten. Without one x is
    copied to one where the product is extended, and x A^T from it, so that the buffer can be freed. `low_rank` is
    x A^T, in the right part of `extended` where there is one, where it is known already.
    Returns: (y [T, N], x A^T [T, E] or None, dropout masks); the last two are what the backward needs besides x.
    """
    group = prepared.group
    y = torch.empty(x.shape[0], group.out_features, dtype=x.dtype, device=x.device) if out is None else out
    masks = dropout_masks(group, x)
    is_extended = prepared.joined is not None or prepared.in_turn is not None
    if extended is None and is_extended and group.extension:
        extended, low_rank = _extended_copy(prepared, x, masks)
    elif low_rank is None:
        beside = None if extended is None or group.is_fp8 else extended[:, group.in_features :]
        low_rank = low_rank_input(prepared, x, masks, out=beside)
    if prepared.fp8 is not None:
        fp8_linear(x, prepared.fp8, _fp8_term(group, low_rank, prepared.b), out=y)
        if prepared.bias is not None:
            y += prepared.bias
        return y, low_rank, masks
    if prepared.joined is not None and extended is not None and low_rank is not None:
        _linear(extended, prepared.joined[: group.out_features], prepared.bias, y)
        return y, low_rank, masks
    bias = prepared.bias
    if prepared.in_turn is not None:
        source = x if extended is None else extended
        for rows, weight in prepared.in_turn:
            if bias is None:
                torch.mm(source, weight.t(), out=y[:, rows])
            else:
                y[:, rows] = matmul_fp32(source, weight.t()).add_(bias[rows])
        return y, low_rank, masks
    if low_rank is not None and prepared.b is not None and _adds_in_16_bits(x.device, x.dtype):
        for rows, weight in prepared.weights:
            total = add_matmul(matmul_fp32(low_rank, prepared.b[rows].t()), x, weight.t())
            y[:, rows] = total if bias is None else total.add_(bias[rows])
        return y, low_rank, masks
    if low_rank is not None:  # the small terms come first: only they round before the large product is added
        assert prepared.b is not None
        _linear(low_rank, prepared.b, bias, y)
    for rows, weight in prepared.weights:
        if low_rank is None:
            _linear(x, weight, None if bias is None else bias[rows], y[:, rows])
        else:
            y[:, rows].addmm_(x, weight.t())
    return y, low_rank, masks


def input_grad(
    prepared: PreparedGroup,
    dy: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    *,
    extended: torch.Tensor | None = None,
    dy_low_rank: torch.Tensor | None = None,
    needs_dx: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dX [T, K] or None, dY B [T, E] or None): the second is what `parameter_grads` needs.

    `extended` is the buffer of `output_buffer` whose left part dy is; its right part is overwritten, unless it is
    `dy_low_rank`, which is dY B where that is known already.
    """
    group = prepared.group
    if prepared.b is not None and dy_low_rank is None:
        beside = None if extended is None or group.is_fp8 else extended[:, group.out_features :]
        dy_low_rank = dy.new_empty(dy.shape[0], group.extension) if beside is None else beside
        torch.mm(dy, prepared.b, out=dy_low_rank)
    if not needs_dx:
        return None, dy_low_rank
    if prepared.joined is not None and extended is not None and dy_low_rank is not None and not group.has_dropout:
        return extended @ prepared.joined[:, : group.in_features], dy_low_rank
    if prepared.in_turn is not None:
        return _input_grad_in_turn(prepared, prepared.in_turn, dy, dy_low_rank, masks), dy_low_rank
    dx = None
    if prepared.fp8 is not None:
        term = (
            None if group.has_dropout else _fp8_term(group, dy_low_rank, None if prepared.a is None else prepared.a.t())
        )
        dx = fp8_input_grad(dy, prepared.fp8, term)
        if term is not None:
            return dx, dy_low_rank
    if dy_low_rank is not None and prepared.a is not None:
        if group.has_dropout or (dx is None and _adds_in_16_bits(dy.device, dy.dtype)):
            # All terms, with dropout one for each projection, are added up before the sum is rounded.
            total = _masked_low_rank_grad(group, dy_low_rank, prepared.a, masks)
            terms = [matmul_fp32(dy[:, rows], weight) for rows, weight in prepared.weights]
            for product in terms if dx is None else [dx]:
                total += product
            return total.to(dy.dtype), dy_low_rank
        dx = dy_low_rank @ prepared.a
    # Every product but the last adds a rounding as large as the sum so far, so the widest comes last.
    for rows, weight in sorted(prepared.weights, key=lambda part: part[1].shape[0]):
        dx = dy[:, rows] @ weight if dx is None else dx.addmm_(dy[:, rows], weight)
    return dx, dy_low_rank


def parameter_grads(
    prepared: PreparedGroup,
    dy: torch.Tensor,
    dy_low_rank: torch.Tensor | None,
    x: torch.Tensor,
    low_rank: torch.Tensor | None,
    masks: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    *,
    stacked_da: torch.Tensor | None = None,
    known_db: Sequence[torch.Tensor | None] = (),
) -> list[torch.Tensor | None]:
    """One gradient for each entry of `group.parameters()` where `needs` says so.

    `low_rank` is x A^T of the forward, and may be None where no B needs a gradient. Where they are known already,
    `stacked_da` is that of `stacked_a_grad`, and `known_db` the gradient of each B; x is then not read for the first.
    """
    group = prepared.group
    is_wanted = stacked_da is None and any(needs[2::PARAMETERS_PER_PROJECTION])
    if is_wanted and dy_low_rank is not None and not group.has_dropout:
        stacked_da = stacked_a_grad(group, dy_low_rank, x)
    grads: list[torch.Tensor | None] = []
    known_db = known_db or _db_together(group, dy, low_rank, needs)
    for index, projection in enumerate(group.projections):
        first = index * PARAMETERS_PER_PROJECTION
        needs_w, needs_bias, needs_a, needs_b = needs[first : first + PARAMETERS_PER_PROJECTION]
        rows, ranks = group.row_slices[index], group.rank_slices[index]
        dw = dbias = da = db = None
        if needs_w:
            assert isinstance(projection.weight, torch.Tensor)
            dw = _parameter_grad(dy[:, rows].t(), x, projection.weight.dtype)
        if needs_bias:
            assert projection.bias is not None
            dbias = dy[:, rows].sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(projection.bias.dtype)
        if needs_a:
            assert projection.lora_a is not None and dy_low_rank is not None
            if stacked_da is not None:
                da = stacked_da[ranks]
            else:
                dropped = _dropped(x, masks[index], projection.dropout)
                da = matmul_fp32(dy_low_rank[:, ranks].t(), dropped, factor=projection.scaling)
            da = da.to(projection.lora_a.dtype)
        if needs_b:
            assert projection.lora_b is not None and low_rank is not None
            if known_db:
                db = known_db[index]
                assert db is not None
                db = db.to(projection.lora_b.dtype)
            else:
                db = _parameter_grad(dy[:, rows].t(), low_rank[:, ranks], projection.lora_b.dtype)
        grads += [dw, dbias, da, db]
    return grads


def stacked_a_grad(group: ProjectionGroup, dy_low_rank: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """s_i (dY B)_i^T x of each projection, one below the other [ranks, K], in fp32 or wider."""
    scalings = {p.scaling for p in group.projections if p.rank}
    (factor,) = scalings if len(scalings) == 1 else (1.0,)
    # Without the padding of dY B: the gradients are views of this memory, and stay.
    stacked = matmul_fp32(dy_low_rank[:, : group.rank].t(), x, factor=factor)
    if len(scalings) > 1:
        for projection, ranks in zip(group.projections, group.rank_slices, strict=True):
            stacked[ranks] *= projection.scaling
    return stacked


def _db_together(
    group: ProjectionGroup, dy: torch.Tensor, low_rank: torch.Tensor | None, needs: Sequence[bool]
) -> Sequence[torch.Tensor | None]:
    """The gradient of every B of a group on a GPU from one pass over dY; none where others are wanted, or there is
    one."""
    wanted = needs[3::PARAMETERS_PER_PROJECTION]
    if len(wanted) == 1 or low_rank is None or not (dy.is_cuda and all(wanted)):
        return ()
    together = matmul_fp32(dy[:, : group.out_features].t(), low_rank)
    parts = zip(group.row_slices, group.rank_slices, strict=True)
    return [together[rows, ranks].contiguous() for rows, ranks in parts]


def dropout_masks(group: ProjectionGroup, x: torch.Tensor) -> list[torch.Tensor | None]:
    """Which entries of x `[T, K]` each projection's LoRA keeps: bool masks drawn from torch's generator, in order."""
    return [
        torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p.dropout)
        if p.dropout > 0 and p.rank else None
        for p in group.projections
    ]  # fmt: skip


def draws_masks(layer: Any) -> bool:
    """Whether the adapters of a layer, of any of its `groups()`, draw random numbers."""
    return any(group.has_dropout for group in layer.groups())


def low_rank_input(
    prepared: PreparedGroup,
    x: torch.Tensor,
    masks: Sequence[torch.Tensor | None],
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """dropout(x) A^T [T, E], or None for a group without LoRA."""
    group = prepared.group
    if prepared.a is None:
        return None
    out = x.new_empty(x.shape[0], group.extension) if out is None else out
    if not group.has_dropout:
        return torch.mm(x, prepared.a.t(), out=out)
    out.zero_()
    for projection, ranks, mask in zip(group.projections, group.rank_slices, masks, strict=True):
        torch.mm(_dropped(x, mask, projection.dropout), prepared.a[ranks].t(), out=out[:, ranks])
    return out


def _extended_copy(
    prepared: PreparedGroup, x: torch.Tensor, masks: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """([x | x A^T] in a new buffer, x A^T once more by itself)"""
    group = prepared.group
    extended = group.input_buffer(x, x.dtype)
    left, right = extended[:, : group.in_features], extended[:, group.in_features :]
    if prepared.a is not None and not group.has_dropout and serves_rows(x, group.rank):
        low_rank = torch.empty(right.shape, dtype=x.dtype, device=x.device)
        copy_with_product(x, prepared.a, group.rank, out=left, low_rank=right, kept=low_rank)
        return extended, low_rank
    low_rank_input(prepared, copy_rows(left, x), masks, out=right)
    return extended, right.clone()


def _fp8_term(group: ProjectionGroup, left: torch.Tensor | None, right: torch.Tensor | None) -> Term | None:
    """LoRA's term of an FP8 product, from x A^T and B [N, E] or from dY B and A^T [K, E]; None without adapter."""
    if left is None or right is None:
        return None
    return Term(left[:, : group.rank], right[:, : group.rank])


def project_group(x: torch.Tensor, group: ProjectionGroup) -> torch.Tensor:
    """The joined output `[..., N]` of `x [..., K]` under autograd, with gradients for x and the trainable tensors.

    Computes in autocast's dtype where autocast is on.
    """
    return _ProjectGroup.apply(x, group, *group.parameters())


def project_reference(
    x: torch.Tensor, projection: Projection, masked_input: torch.Tensor | None = None
) -> torch.Tensor:
    """One projection by its definition, differentiable; `masked_input` stands for dropout(x)."""
    weight = projection.weight
    if isinstance(weight, Nf4Weight):
        weight = dequantize_nf4(weight, x.dtype)
    y = torch.nn.functional.linear(
        x, weight.to(x.dtype), None if projection.bias is None else projection.bias.to(x.dtype)
    )
    if projection.lora_a is None or projection.lora_b is None:
        return y
    inner = (x if masked_input is None else masked_input) @ projection.lora_a.to(x.dtype).t()
    return y + inner @ projection.lora_b.to(x.dtype).t() * projection.scaling


def _adds_in_16_bits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product that is added to a 16-bit matrix may have been rounded to 16 bits before.

    cuBLAS does not say. On an H100, losses of LoRA over dense weights, added so, fell in the first steps as where each
    term is rounded for itself, a third as fast as over 4-bit weights, whose product is extended.
    """
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _pays_to_join(group: ProjectionGroup, dtype: torch.dtype, device: torch.device, rows: int) -> bool:
    """Whether dense weights are copied beside A and B: that moves 4 bytes a weight, fp32 sums 14 a value of y."""
    return group.extension > 0 and _adds_in_16_bits(device, dtype) and 4 * rows > group.in_features


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _parameter_grad(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return left @ right if left.dtype == dtype else matmul_fp32(left, right).to(dtype)


def _dropped(x: torch.Tensor, mask: torch.Tensor | None, probability: float) -> torch.Tensor:
    return x if mask is None else x * mask * (1.0 / (1.0 - probability))


def _masked_low_rank_grad(
    group: ProjectionGroup, dy_low_rank: torch.Tensor, a: torch.Tensor, masks: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """dY B A [T, K] with each projection's share under its own mask, added up in fp32."""
    total = None
    for projection, ranks, mask in zip(group.projections, group.rank_slices, masks, strict=True):
        if projection.rank:
            share = matmul_fp32(dy_low_rank[:, ranks], a[ranks])
            if mask is not None:
                share.mul_(mask).mul_(1.0 / (1.0 - projection.dropout))
            total = share if total is None else total.add_(share)
    assert total is not None
    return total


def _input_grad_in_turn(
    prepared: PreparedGroup,
    in_turn: WeightsInTurn,
    dy: torch.Tensor,
    dy_low_rank: torch.Tensor | None,
    masks: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """dX [T, K], whose terms are all added up before the sum is rounded, as in the product of joined weights."""
    group = prepared.group
    if dy_low_rank is None or prepared.a is None:
        dtype = torch.promote_types(dy.dtype, torch.float32)
        total = torch.zeros(dy.shape[0], group.in_features, dtype=dtype, device=dy.device)
    else:
        total = _masked_low_rank_grad(group, dy_low_rank, prepared.a, masks)
    for rows, weight in in_turn:
        add_matmul(total, dy[:, rows], weight[:, : group.in_features])
    return total.to(dy.dtype)


class _ProjectGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, *parameters):
        dtype = compute_dtype(x, group.dtype)
        with no_autocast(x.device.type):
            rows = rows_of(x).to(dtype)
            y, low_rank, masks = project(prepare(group, dtype, rows=rows.shape[0]), rows)
        ctx.save_for_backward(x, low_rank, *masks, *parameters)
        ctx.group, ctx.dtype = group, dtype
        return y.view(*x.shape[:-1], group.out_features)

    @staticmethod
    def backward(ctx, dy):
        group = ctx.group
        x, low_rank, *rest = ctx.saved_tensors
        masks = rest[: len(group.projections)]
        with no_autocast(x.device.type):
            dy_rows, extended = rows_of(dy).to(ctx.dtype), None
            prepared = prepare(group, ctx.dtype, rows=dy_rows.shape[0])
            if prepared.joined is not None and group.extension:
                extended = group.output_buffer(dy_rows, ctx.dtype)
                dy_rows = copy_rows(extended[:, : group.out_features], dy_rows)
            dx, dy_low_rank = input_grad(prepared, dy_rows, masks, extended=extended, needs_dx=ctx.needs_input_grad[0])
            grads = parameter_grads(
                prepared, dy_rows, dy_low_rank, rows_of(x).to(ctx.dtype), low_rank, masks, ctx.needs_input_grad[2:]
            )
        return None if dx is None else dx.to(x.dtype).view(x.shape), None, *grads
