"""What the tests of FP8 products and kept weights notice: bugs planted in them, as in `test_planted_bugs.py`."""

import pytest

from fastllm.kernels.linear_cross_entropy import LogitTransform

from ..planting import Bug
from .test_fp8 import (
    check_factors,
    check_kept,
    check_products,
    check_quantize,
    check_transposed,
    check_weight,
    check_wide_rows,
)
from .test_fp8_head import (
    check_head_transposed,
    check_hidden_grads,
    check_label_rows,
    check_logit_grads,
    check_sure_rows,
)
from .test_fp8_low_rank import check_balance, check_left, check_term
from .test_kept_weights import check_dtypes, check_follows, replaced, rewritten
from .test_linear_cross_entropy import check_labels_that_are_none
from .test_planted_bugs import check_noticed, checks, pytestmark  # noqa: F401

KEPT_WEIGHTS = {
    "writes_go_unnoticed": Bug(
        "(tensor.data_ptr(), tensor._version)", "tensor.data_ptr()",
        checks(check_follows, rewritten("packed"), on="reference"),
    ),
    "exchange_goes_unnoticed": Bug(
        "(tensor.data_ptr(), tensor._version)", "tensor._version",
        checks(check_follows, replaced("packed"), on="reference"),
    ),
    "statistics_go_unnoticed": Bug(
        "weight.packed, weight.absmax, weight.code,", "weight.packed, weight.code,",
        checks(check_follows, replaced("absmax"), on="reference"),
    ),
    "nested_statistics_go_unnoticed": Bug(
        "weight.nested_absmax, weight.nested_code,", "weight.nested_code,",
        checks(check_follows, rewritten("nested_absmax"), on="reference"),
    ),
    "other_dtype_goes_unnoticed": Bug(
        "return layout, tensors, numbers", "return layout[:-1], tensors, numbers", checks(check_dtypes, on="reference")
    ),
}  # fmt: skip

FP8 = {
    "largest_does_not_fit": Bug(
        "(largest >> 23) - 8 + tl.where", "(largest >> 23) - 9 + tl.where", checks(check_quantize)
    ),
    "half_a_range_wasted": Bug("(largest & 0x7FFFFF) > 0x600000", "(largest & 0x7FFFFF) > 0", checks(check_quantize)),
    "ties_rounded_up": Bug("0x7FFFF + ((magnitude >> 20) & 1)", "0x80000", checks(check_quantize)),
    "sign_lost": Bug("(tl.where(magnitude < (127 - 6) << 23, steps, normal) | sign)",
                     "tl.where(magnitude < (127 - 6) << 23, steps, normal)", checks(check_quantize)),
    "small_values_lost": Bug("magnitude < (127 - 6) << 23, steps,", "magnitude < (127 - 6) << 23, 0,",
                             checks(check_quantize)),
    "zero_rows_scaled_by_zero": Bug("tl.where(largest == 0, 127, tl.maximum(exponent, 1))", "tl.maximum(exponent, 1)",
                                    checks(check_quantize)),
    "largest_of_the_last_part": Bug("tl.maximum(magnitudes, magnitude_bits(piece))", "magnitude_bits(piece)",
                                    checks(check_wide_rows)),
    "factors_of_the_first_part": Bug("tl.load(factors_ptr + cols,", "tl.load(factors_ptr + cols % 4095,",
                                     checks(check_wide_rows)),
    "factors_ignored": Bug("HAS_FACTORS=factors is not None", "HAS_FACTORS=False", checks(check_factors)),
    "factors_ignored_in_the_reference": Bug("x.float() * factors", "x.float()", checks(check_factors, on="reference")),
    "weight_scales_twice_in_the_gradient": Bug("found.scales.fill_(1.0)", "found.scales.fill_(float(source.scales[0]))",
                                               checks(check_products, on="reference")),
    "small_rows_have_their_own_scale": Bug("HAS_LEAST=at_least is not None", "HAS_LEAST=False", checks(check_weight)),
    "small_rows_have_their_own_scale_in_the_reference": Bug("torch.maximum(largest, at_least)", "largest",
                                                            checks(check_weight, on="reference")),
    "no_room_for_the_term": Bug("largest = tl.maximum(largest, tl.max(magnitude_bits(left), axis=0))", "pass",
                                checks(check_left)),
    "low_part_lost": Bug("e4m3_bits(x - e4m3_value(high))", "e4m3_bits(x - x)", checks(check_left)),
    "sign_of_the_low_part_lost": Bug("tl.where(bits >= 0x80, -value, value)", "value", checks(check_left)),
    "small_steps_read_as_normal": Bug("magnitude < 8, magnitude.to", "magnitude < 0, magnitude.to", checks(check_left)),
    "columns_past_the_ranks_not_written": Bug("mask=(rest >= 3 * rank) & (rest < extension)", "mask=rest < 0",
                                              checks(check_left)),
    "no_room_for_the_term_in_the_reference": Bug("torch.maximum(largest, term.abs().amax(1))", "largest",
                                                 checks(check_left, on="reference")),
    "scales_of_the_input_ignored": Bug("left.dequantized(wide) @", "left.values.to(wide) @",
                                       checks(check_products, on="reference")),
    "tiles_not_transposed": Bug("tl.trans(tile)", "tile", checks(check_transposed, 64, 64)),
}  # fmt: skip

WEIGHT_FORMS = {
    "transposed_weight_goes_stale": Bug(
        "known is None and kept is not None and group.is_packed", "known is None and kept is not None",
        checks(check_kept, ("nf4", "dense"), on="reference"),
    ),
}  # fmt: skip
PROJECTIONS = {
    "transposed_weight_is_not_counted": Bug("held + self.is_packed * transposed", "held",
                                            checks(check_kept, ("nf4", "nf4"), on="reference")),
}  # fmt: skip
FP8_LOW_RANK = {
    "balance_of_the_first_rows": Bug("range(0, parts, 16)", "range(0, 1, 16)", checks(check_balance, 600, 40)),
    "right_not_scaled_by_row": Bug("value.to(tl.float32) / scales[:, None]", "value.to(tl.float32)",
                                   checks(check_balance, 40, 5)),
    "columns_past_the_ranks_not_written": Bug(
        "mask=row_live & (rest >= 3 * rank) & (rest < extension)", "mask=row_live & (rest < 0)",
        checks(check_balance, 40, 5),
    ),
    "low_part_of_the_right_factor_lost": Bug("(rank + ranks)[None, :], low", "(rank + ranks)[None, :], high",
                                             checks(check_balance, 40, 5)),
    "zeros_balanced": Bug("tl.where(largest == 0, 0.0, balance)", "balance", checks(check_balance, 40, 5)),
    "reference_not_scaled_by_row": Bug("right.float() / matrix.scales[:, None]", "right.float()",
                                       checks(check_term, 0.02, on="reference")),
    "term_forgotten": Bug("    if term is None:\n        return", "    if term is None or True:\n        return",
                          checks(check_term, 0.02, on="reference")),
    "factors_forgotten": Bug("weight.folded_scales(), term, None)", "None, term, None)",
                             checks(check_term, 0.02, on="reference")),
}  # fmt: skip
FP8_HEAD = {
    "tiles_of_the_head_not_transposed": Bug("values = tl.trans(to_e4m3(", "values = (to_e4m3(",
                                            checks(check_head_transposed, 64, 64)),
    "scales_of_the_first_inputs_only": Bug("mask=j < columns)", "mask=j < 64)", checks(check_head_transposed, 48, 80)),
    "head_not_scaled_in_the_reference": Bug("weight.t().float() / out.scales[:, None]", "weight.t().float()",
                                            checks(check_head_transposed, 48, 80, on="reference")),
    "label_rows_not_rounded": Bug("weight = e4m3_value(to_e4m3(weight / scale, PTX)) * scale", "pass",
                                  checks(check_label_rows)),
    "label_rows_not_rounded_in_the_reference": Bug("grads.of_labels[:, None], rounded,",
                                                   "grads.of_labels[:, None], rows,",
                                                   checks(check_label_rows, on="reference")),
    "rows_of_the_first_label": Bug("labels_ptr + row)\n    label =", "labels_ptr)\n    label =",
                                   checks(check_label_rows)),
    "labels_forgotten": Bug("grads.of_labels[:, None], rounded", "0.0 * grads.of_labels[:, None], rounded",
                            checks(check_hidden_grads, on="reference")),
    "labels_twice": Bug("grads.float().scatter(1, at_labels, 0.0)", "grads.float()",
                        checks(check_logit_grads, on="reference")),
    "scale_out_of_range": Bug("largest < LEAST_ENTRY", "largest == 0", checks(check_sure_rows, on="reference")),
    "rows_not_scaled_in_the_reference": Bug("self.others.scales.copy_(largest / LARGEST)",
                                            "self.others.scales.copy_(largest)",
                                            checks(check_logit_grads, on="reference")),
}  # fmt: skip
LOSS = {
    "scaled_by_the_largest_logit": Bug("tl.where(start + cols == label, -float(\"inf\"), z), axis=0))", "z, axis=0))",
                                       checks(check_logit_grads)),
    "labels_in_the_product": Bug("value = 0 if IN_FP8", "value = 9 if IN_FP8",
                                 checks(check_logit_grads)),
    "label_of_another_row": Bug("label, value, mask=is_label)", "label, value)", checks(check_labels_that_are_none)),
    "unknown_label_unnoticed": Bug("other=float(\"nan\"))", "other=0.0)", checks(check_labels_that_are_none)),
    "label_not_capped": Bug("of_label *= soft_cap_slope(target, softcap)", "of_label *= 1.0",
                            checks(check_logit_grads, LogitTransform(softcap=5.0))),
    "scale_of_ignored_rows_not_written": Bug("tl.store(scales_ptr + row, 0.0)", "pass", checks(check_hidden_grads)),
    "hidden_gradient_of_the_chunk_before": Bug("fp8_head.hidden_grad(in_fp8, y,", "fp8_head.hidden_grad(in_fp8, y * 0,",
                                               checks(check_hidden_grads, on="reference")),
}  # fmt: skip
BUGS = {
    "fp8_head": FP8_HEAD,
    "linear_cross_entropy": LOSS,
    "fp8_low_rank": FP8_LOW_RANK,
    "kept_weights": KEPT_WEIGHTS,
    "fp8": FP8,
    "weight_forms": WEIGHT_FORMS,
    "projections": PROJECTIONS,
}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}")
    for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
