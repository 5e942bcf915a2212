"""The arithmetic of the attention benchmark, and that it runs what a layer runs."""

import pytest

from benchmarks.attention import BACKENDS, CASES, Rows, measure, serves


def pairs_by_hand(rows: Rows) -> int:
    seen = 0
    for query in range(rows.sequence):
        first = query - query % rows.document if rows.document else 0
        seen += query - max(first, query - rows.window + 1 if rows.window else 0) + 1
    return rows.batch * seen


@pytest.mark.parametrize(
    "rows",
    [
        Rows(2, 60), Rows(1, 60, document=20), Rows(3, 60, window=7), Rows(1, 60, window=90),
        Rows(1, 60, document=20, window=7),
    ],
)  # fmt: skip
def test_pairs_that_see_each_other(rows):
    assert rows.pairs == pairs_by_hand(rows)


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_fastllms_kernel(name):
    assert serves(CASES[name], "triton")
    assert CASES[name].softcap or sum(serves(CASES[name], backend) for backend in BACKENDS) > 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_kernel_is_timed_forward_and_backward(device):
    found = measure(Rows(1, 32, 2, 1, 16, document=8), "triton", device.type)
    assert found.keys() == {"forward_us", "backward_us", "forward_tflops", "backward_tflops"}
    assert all(value >= 0 for value in found.values()) and found["forward_us"] > 0
