"""What the tests of LoRA's narrow products notice that are made while their rows are written."""

import pytest

from ..planting import Bug
from .test_copy_lora import check_copy
from .test_planted_bugs import check_noticed, checks, pytestmark  # noqa: F401

COPY_LORA = {
    "last_columns_only": Bug(
        "total = tl.dot(y, tl.trans(a), total,", "total = tl.dot(y, tl.trans(a),", checks(check_copy, 5, 300)
    ),
    "columns_past_the_rank_not_written": Bug(
        "row_live & (beyond >= rank) & (beyond < extension)", "row_live & (beyond < 0)", checks(check_copy, 5, 70)
    ),
    "product_in_one_place_only": Bug("HAS_KEPT=kept is not None", "HAS_KEPT=False", checks(check_copy, 5, 70)),
    "reference_without_rank": Bug(
        "torch.mm(y, a[:rank].t()", "torch.mm(y, a[:rank].flip(0).t()", checks(check_copy, 5, 70, on="reference")
    ),
}  # fmt: skip
BUGS = {"copy_lora": COPY_LORA}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
