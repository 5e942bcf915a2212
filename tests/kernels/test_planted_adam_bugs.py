"""What the tests of AdamW with 8-bit states notice: bugs planted in it, as in `test_planted_bugs.py`."""

import pytest
import torch

from ..planting import Bug
from .test_adam_8bit import check_codes, check_neighbours, check_not_finite, check_opposed, check_steps, check_zeros
from .test_planted_bugs import check_noticed, checks, pytestmark  # noqa: F401

KERNEL = {
    "a_code_too_low": Bug("return count + (x >", "return count + 0 * (x >", checks(check_codes)),
    "a_decade_forgotten": Bug("tl.static_range(1, 7)", "tl.static_range(1, 6)", checks(check_codes)),
    "small_negative_values_become_positive": Bug(
        "tl.minimum(tl.maximum(step1, 1), 127)", "tl.minimum(step1, 127)", checks(check_codes)
    ),
    "most_negative_code_wraps": Bug(
        "tl.minimum(tl.maximum(step1, 1), 127)", "tl.maximum(step1, 1)", checks(check_codes)
    ),
    "ties_go_down": Bug("midpoints[1::2] = torch.nextafter(midpoints[1::2], -infinity)", "pass", checks(check_codes)),
    "padding_sets_the_scale": Bug("mask=live, other=127)", "mask=live, other=0)", checks(check_opposed)),
    "not_finite_gradients_in_state_2": Bug(
        "s2 = tl.where(finite, s2, 0.0)", "s2 = s2", checks(check_not_finite)
    ),
    "not_finite_gradients_in_p": Bug(
        "tl.where(finite, updated, p)", "updated", checks(check_not_finite)
    ),
    "codes_of_zeros": Bug(
        "x1 = tl.where((absmax1 == 0.0)[:, None], 1.0, x1)", "x1 = x1", checks(check_zeros)
    ),
    "eps_not_corrected": Bug(
        "tl.fma(c2, eps, tl.sqrt(s2))", "tl.fma(1.0, eps, tl.sqrt(s2))", checks(check_steps, 700, eps=1e-2)
    ),
    "second_power_of_the_first_beta": Bug("_log2(beta2, PTX)", "_log2(beta1, PTX)", checks(check_steps, 700)),
    "no_decay": Bug("tl.fma(-lr, weight_decay, 1.0)", "tl.fma(-lr, 0.0, 1.0)", checks(check_steps, 700)),
    "square_in_16_bit_without_its_weight": Bug(
        "tl.fma(s2, beta2, g * g2)", "tl.fma(s2, beta2, g * g)", checks(check_steps, 700, dtype=torch.float16)
    ),
    "writes_past_the_last_block": Bug(
        "absmax1, mask=live_blocks)\n    tl.store", "absmax1)\n    tl.store", checks(check_neighbours)
    ),
}  # fmt: skip

REFERENCE = {
    "small_negative_values_become_positive": Bug(
        "code1.clamp(max=126)", "code1", checks(check_codes, on="reference")
    ),
    "maps_exchanged": Bug(
        "zip((map1, map2), codes", "zip((map2, map1), codes", checks(check_steps, 700, on="reference")
    ),
    "denominator_without_the_root": Bug(
        "_fma(c2, least, s2.sqrt())", "_fma(c2, least, s2)", checks(check_steps, 700, on="reference")
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", [
    pytest.param(bug, id=name) for bugs in (KERNEL, REFERENCE) for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(bug, device, monkeypatch, tmp_path):
    check_noticed("adam_8bit", bug, device, monkeypatch, tmp_path)
