"""What the tests of FP8 products and kept weights notice: bugs planted in them, as in `test_planted_bugs.py`."""

import pytest
import torch

from ..planting import Bug
from .test_fp8 import check_factors, check_kept, check_products, check_quantize, check_separate_terms, check_transposed
from .test_kept_weights import check_dtypes, check_follows, replaced, rewritten
from .test_low_rank_glu import check_low_rank_glu, check_terms
from .test_planted_bugs import check_noticed, checks, pytestmark  # noqa: F401
from .test_rms_norm import check_fp8

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
    "factors_ignored": Bug("HAS_FACTORS=factors is not None", "HAS_FACTORS=False", checks(check_factors)),
    "factors_ignored_in_the_reference": Bug("x.float() * factors", "x.float()", checks(check_factors, on="reference")),
    "weight_scales_not_in_the_gradient": Bug("quantize_rows(dy, factors=weight.scales)", "quantize_rows(dy)",
                                             checks(check_products, on="reference")),
    "weight_scales_twice_in_the_gradient": Bug(
        "Fp8Matrix(transposed, ones)", "Fp8Matrix(transposed, ones * weight.scales[0])",
        checks(check_products, on="reference"),
    ),
    "scales_of_the_input_ignored": Bug("left.dequantized(wide) @", "left.values.to(wide) @",
                                       checks(check_products, on="reference")),
    "tiles_not_transposed": Bug("tl.trans(tile)", "tile", checks(check_transposed, 64, 64)),
}  # fmt: skip

LORA = {
    "transposed_weight_goes_stale": Bug("kept is not None and group.is_packed", "kept is not None",
                                        checks(check_kept, ("nf4", "dense"), on="reference")),
}  # fmt: skip
PROJECTIONS = {
    "transposed_weight_is_not_counted": Bug("(self.in_features * (1 + self.is_packed) + 4)", "(self.in_features + 4)",
                                            checks(check_kept, ("nf4", "nf4"), on="reference")),
}  # fmt: skip
RMS_NORM = {
    "quantised_before_it_is_rounded": Bug(
        "y = y.to(tl.float32)\n", "y = x * rstd[:, None] * w[None, :]\n",
        checks(check_fp8, 33, 257, dtype=torch.float16),
    ),
    "one_scale_for_all_rows": Bug("magnitude_bits(y), axis=1", "magnitude_bits(tl.max(y, axis=0)[None, :]), axis=1",
                                  checks(check_fp8, 33, 64)),
    "reference_quantises_the_input": Bug("quantize_rows(y, out=fp8)", "quantize_rows(x, out=fp8)",
                                         checks(check_fp8, 33, 64, on="reference")),
}  # fmt: skip
LOW_RANK_GLU = {
    "term_of_up_is_gates": Bug(
        "up_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,\n"
        "        rows, cols, num_rows, width, HAS_UP, PRECISION,\n    )  # fmt: skip\n    acted, _ =",
        "gate_left, up_right, up_rank, ul_row, ul_rank, ur_rank, ur_column, up_scaling,\n"
        "        rows, cols, num_rows, width, HAS_UP, PRECISION,\n    )  # fmt: skip\n    acted, _ =",
        checks(check_low_rank_glu, 5, 40),
    ),
    "scaling_ignored": Bug("(right.to(tl.float32) * scaling)", "right.to(tl.float32)",
                           checks(check_low_rank_glu, 5, 40)),
    "only_sixteen_ranks": Bug("range(0, rank, 16)", "range(0, 1, 16)",
                              checks(check_low_rank_glu, 5, 40, ranks=(17, 33, 20))),
    "scaling_ignored_in_the_reference": Bug("(self.right * self.scaling)", "self.right",
                                            checks(check_low_rank_glu, 5, 40, on="reference")),
    "ranks_of_another_projection": Bug("LowRankTerm(low_rank[:, ranks], right.t())",
                                       "LowRankTerm(low_rank[:, : right.shape[1]], right.t())",
                                       checks(check_terms, on="reference")),
}  # fmt: skip
DECODER_GLU = {
    "term_of_hidden_forgotten": Bug("terms = _term_of_hidden(layer, dy_low_rank), *", "terms = None, *",
                                    checks(check_separate_terms, on="reference")),
    "terms_of_the_output_forgotten": Bug("layer.activation, *_terms_of_gate_and_up(layer, state), out=out",
                                         "layer.activation, None, None, out=out",
                                         checks(check_separate_terms, on="reference")),
}  # fmt: skip
BUGS = {
    "low_rank_glu": LOW_RANK_GLU,
    "decoder_glu": DECODER_GLU,
    "rms_norm": RMS_NORM,
    "kept_weights": KEPT_WEIGHTS,
    "fp8": FP8,
    "lora": LORA,
    "projections": PROJECTIONS,
}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}")
    for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
