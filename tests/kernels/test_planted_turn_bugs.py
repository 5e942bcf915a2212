"""What the tests of weights that are taken in turn notice."""

import pytest

from ..planting import Bug
from .test_lora import DROPOUT, GROUPS
from .test_planted_bugs import check_noticed, checks, pytestmark  # noqa: F401
from .test_weights_in_turn import IN_PIECES, check_in_pieces, check_in_turn

IN_TURN = {
    "only_the_first_is_dequantised": Bug(
        "dequantize_nf4(projection.weight.rows(piece)", "dequantize_nf4(group.projections[0].weight.rows(piece)",
        checks(check_in_turn, GROUPS["gate_up"], on="reference"),
    ),
    "first_piece_only": Bug(
        "projection.weight.rows(piece)", "projection.weight.rows(slice(0, piece.stop - piece.start))",
        checks(check_in_pieces, IN_PIECES, on="reference"),
    ),
    "rows_of_b_of_the_first": Bug(
        "self.b[rows]", "self.b[: projection.out_features]", checks(check_in_turn, GROUPS["gate_up"], on="reference")
    ),
}  # fmt: skip

PRODUCTS = {
    "all_outputs_from_the_last": Bug(
        "for rows, weight in prepared.in_turn:", "for rows, weight in list(prepared.in_turn):",
        checks(check_in_turn, GROUPS["gate_up"], on="reference"),
    ),
    "all_terms_from_the_last": Bug(
        "for rows, weight in in_turn:", "for rows, weight in list(in_turn):",
        checks(check_in_turn, GROUPS["gate_up"], on="reference"),
    ),
    "bias_of_the_first": Bug(
        "y[:, rows] = matmul_fp32(source, weight.t()).add_(bias[rows])",
        "y[:, rows] = matmul_fp32(source, weight.t()).add_(bias[: weight.shape[0]])",
        checks(check_in_turn, GROUPS["qkv_bias"], on="reference"),
    ),
    "last_term_only": Bug(
        "        add_matmul(total, dy[:, rows], weight[", "        total = matmul_fp32(dy[:, rows], weight[",
        checks(check_in_turn, DROPOUT, on="reference"),
    ),
}  # fmt: skip
NF4 = {
    "statistics_of_the_first_rows": Bug(
        "absmax=self.absmax[blocks]", "absmax=self.absmax[: blocks.stop - blocks.start]",
        checks(check_in_pieces, IN_PIECES, on="reference"),
    ),
    "nested_statistics_of_the_first_rows": Bug(
        "nested = nested[blocks.start // self.nested_blocksize :", "nested = nested[0 :",
        checks(check_in_pieces, IN_PIECES, on="reference"),
    ),
}  # fmt: skip
BUGS = {"weights_in_turn": IN_TURN, "lora": PRODUCTS, "nf4": NF4}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
