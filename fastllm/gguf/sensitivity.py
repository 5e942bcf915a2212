"""What a tensor's quantization costs the model, estimated before anything is written.

For small changes dW the divergence of the predictions grows by one half of E[(g^T dW x)^2], with x the input and g the
gradient of the log-likelihood at the output, labels drawn from the model itself (that is, the Fisher information). With
the diagonal of E[x x^T] and E[g g^T] alone that is  1/2 sum_ij E[g_i^2] E[x_j^2] dW_ij^2,  in nats per token.

That holds for errors of random signs. An error can also have a part along the weight itself: dW = -e W + noise, as
codes of least squared error do (`quantizers/shrinkage.py` says what is done about it). All rows and all tokens shrink
together, so what is left of this part adds up before it is squared: 1/2 e^2 E[(sum_t g_t^T W x_t)^2] / T  over chunks
of T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .quantizers import quantizer_of, regaining_factor
from .recipes import fitting_type
from .tensor_types import TensorType

SAMPLED_ROWS = 512  # of a tensor, by default


def expected_divergences(
    weight: torch.Tensor,
    kinds: Iterable[TensorType],
    *,
    importance: torch.Tensor | None = None,
    output_importance: torch.Tensor | None = None,
    scale_importance: torch.Tensor | None = None,
    sampled_rows: int = SAMPLED_ROWS,
) -> dict[str, float]:
    """The expected divergence, by type name, of quantizing `weight` [out, in] or [experts, out, in] to each of `kinds`.

    `importance` is E[x^2], [in] or [experts, in]; `output_importance` E[g^2], [out] or [experts, out]; absent ones
    count as 1, which makes the result comparable between the types of one tensor only. `scale_importance`, one value or
    [experts], is E[(sum g^T W x)^2] / T; without it, shrinking costs nothing. Rows are sampled evenly.
    """
    matrices = weight.unbind(0) if weight.dim() == 3 else [weight]
    kinds = list(kinds)
    totals = {kind.name: 0.0 for kind in kinds}
    for i, matrix in enumerate(matrices):
        columns = _of_expert(importance, i, weight.dim())
        rows = _of_expert(output_importance, i, weight.dim())
        scale = 0.0 if scale_importance is None else float(scale_importance.reshape(-1)[i])
        found = _of_matrix(matrix, kinds, columns, rows, scale, sampled_rows // len(matrices) or 1)
        for name, divergence in found.items():
            totals[name] += divergence
    return totals


def embedding_divergences(
    weight: torch.Tensor,
    kinds: Iterable[TensorType],
    row_importance: torch.Tensor,
    *,
    sampled_rows: int = SAMPLED_ROWS,
) -> dict[str, float]:
    """`expected_divergences` of an embedding [tokens, width], whose rows are read one at a time.

    `row_importance` [tokens] is the mean of g^2 over the places where a row was read, times the share of those places.
    The most important rows are sampled: tokens are too unevenly frequent for any others.
    """
    rows = row_importance.topk(min(sampled_rows, len(row_importance))).indices
    sampled = row_importance[rows]
    scale = row_importance.sum() / sampled.sum().clamp_min(1e-30)
    matrix = weight[rows.to(weight.device)]
    return expected_divergences(matrix, kinds, output_importance=sampled * scale, sampled_rows=len(rows))


def expected_divergence(change: torch.Tensor, importance: torch.Tensor, output_importance: torch.Tensor) -> float:
    """1/2 sum_ij E[g_i^2] E[x_j^2] dW_ij^2 of a known `change` dW [out, in]."""
    return 0.5 * float(output_importance @ (change.square() @ importance))


def _of_expert(moments: torch.Tensor | None, i: int, weight_dim: int) -> torch.Tensor | None:
    return moments[i] if moments is not None and weight_dim == 3 and moments.dim() == 2 else moments


def _of_matrix(
    matrix: torch.Tensor,
    kinds: Sequence[TensorType],
    columns: torch.Tensor | None,
    rows: torch.Tensor | None,
    scale_importance: float,
    sampled_rows: int,
) -> dict[str, float]:
    num_rows = matrix.shape[0]
    step = max(1, num_rows // sampled_rows)
    sample = matrix[::step].float()
    row_weight = torch.ones(num_rows, device=sample.device) if rows is None else rows.to(sample.device).float()
    column_weight = torch.ones_like(sample[0]) if columns is None else columns.to(sample.device).float()
    # Rows differ in importance: scale by the importance that was sampled, not by the number of rows.
    sampled_weight = row_weight[::step]
    scale = float(row_weight.sum() / sampled_weight.sum().clamp_min(1e-30))
    energy = sampled_weight @ (sample.square() @ column_weight)
    divergences = {}
    for kind in kinds:
        quantizer = quantizer_of(fitting_type(kind, matrix.shape[1]))
        factor = regaining_factor(quantizer, sample, columns)
        change = quantizer.decode(quantizer.encode(sample, columns, factor=factor)).sub_(sample)
        shrunk = float(sampled_weight @ ((change * sample) @ column_weight) / energy.clamp_min(1e-30))
        noise = scale * expected_divergence(change, column_weight, sampled_weight)
        divergences[kind.name] = noise + 0.5 * shrunk**2 * scale_importance
    return divergences
