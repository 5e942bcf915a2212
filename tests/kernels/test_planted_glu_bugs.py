"""What the tests of gated linear units notice, alone and in a decoder layer."""

import pytest

from fastllm.kernels.layer_definition import Keep

from ..planting import Bug
from .test_glu import check_glu, check_overlay
from .test_glu_lora_backward import check_many_programs, check_products
from .test_glu_lora_forward import check_forward
from .test_planted_bugs import check_noticed, checks, layer, pytestmark  # noqa: F401

GLU = {
    "gradient_of_gate_without_up": Bug(
        "(dh * up * slope)", "(dh * slope)", checks(check_glu, 5, 97)),
    "h_never_written": Bug(
        "STORE_H=h_out is not None", "STORE_H=False", checks(check_overlay)),
}  # fmt: skip

GLU_LORA = {
    "gradient_of_b_from_another_matrix": Bug(
        "up_sum = tl.dot(tl.trans(dup)", "up_sum = tl.dot(tl.trans(dgate)", checks(check_products, 5, 97)
    ),
    "last_strip_only": Bug("add_up(sums, wanted)", "add_up(sums[-1:], wanted)", checks(check_many_programs)),
    "last_share_only": Bug("add_up(split_sums, [", "add_up(split_sums[-1:], [", checks(check_many_programs)),
    "gradient_of_a_without_scaling": Bug(
        "PartSum(out, at, factor)", "PartSum(out, at)", checks(check_products, 5, 97)
    ),
    "last_launch_only": Bug(
        "h_sum = _narrow_tile(split_part + h_first,", "h_sum = 0.0 * _narrow_tile(split_part + h_first,",
        checks(check_many_programs),
    ),
    "rows_of_every_later_share": Bug(
        "min(last_tile - above, tiles_of_strip)", "tiles_of_strip", checks(check_many_programs)
    ),
    "rows_of_every_earlier_share": Bug("max(first_tile - above, 0)", "0", checks(check_many_programs)),
    "first_strip_of_a_share_only": Bug(
        "tl.cdiv(last_tile, tiles_of_strip))", "first_tile // tiles_of_strip + 1)", checks(check_many_programs)
    ),
    "reference_without_h": Bug("h_out=h)", "h_out=h.zero_() + 1)", checks(check_products, 5, 97, on="reference")),
    "ranks_of_another_projection": Bug(
        "Narrow(low_rank[:, ranks], b,", "Narrow(low_rank[:, : projection.rank], b,",
        layer("llama_nf4", on="triton"),
    ),
}  # fmt: skip

GLU_LORA_FORWARD = {
    "last_columns_only": Bug(
        "total = tl.dot(h, tl.trans(a), total,", "total = tl.dot(h, tl.trans(a),", checks(check_forward, 5, 300)
    ),
    "columns_past_the_rank_not_written": Bug(
        "row_live & (beyond >= rank) & (beyond < extension)", "row_live & (beyond < 0)", checks(check_forward, 5, 70)
    ),
    "another_activation": Bug(
        "activate(gate, ACTIVATION, PTX)", "activate(up, ACTIVATION, PTX)", checks(check_forward, 5, 70)
    ),
    "reference_without_rank": Bug(
        "multiply_reference(out, a, rank", "multiply_reference(out, a.flip(0), rank",
        checks(check_forward, 5, 70, on="reference"),
    ),
}  # fmt: skip

LAYER_GLU = {
    "product_of_down_not_made_again": Bug(
        "needs_down_low_rank=needs_b and state.down_low_rank is None,", "needs_down_low_rank=False,",
        layer("llama_nf4", on="triton", keep=Keep.INPUT),
    ),
    "gate_and_up_exchanged": Bug(
        "gate, up = layer.split_gate_up(", "up, gate = layer.split_gate_up(", layer("llama_dense")
    ),
}  # fmt: skip
BUGS = {"glu": GLU, "glu_lora_backward": GLU_LORA, "glu_lora_forward": GLU_LORA_FORWARD, "decoder_glu": LAYER_GLU}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
