"""Rows copied between buffers with gaps."""

import pytest
import torch

from fastllm.kernels.row_copy import copy_rows

from .parity import Setting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("gaps", [(0, 0), (0, 6), (16, 0), (3, 5)], ids=str)
@pytest.mark.parametrize("shape", [(5, 61), (3, 2048), (1, 1030), (0, 8)], ids=str)
def test_values_arrive_and_gaps_stay(setting: Setting, shape: tuple[int, int], gaps: tuple[int, int]):
    (rows, width), (before, behind) = shape, gaps
    source = setting.randn(rows, width + before)[:, before:]
    buffer = setting.randn(rows, width + behind)
    gap = buffer[:, width:].clone()
    with setting.active():
        assert copy_rows(buffer[:, :width], source).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer[:, :width], source) and torch.equal(buffer[:, width:], gap)


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
def test_other_dtypes_are_rounded_once(setting: Setting, source_dtype: torch.dtype):
    source = setting.randn(4, 300, dtype=source_dtype, scale=1e3)[:, 7:]
    target = setting.randn(4, 400)[:, :293]
    with setting.active():
        copy_rows(target, source)
    assert torch.equal(target, source.to(setting.dtype))


def test_rows_of_any_strides(setting: Setting):
    """Transposed matrices, and rows that are one."""
    target, column = setting.randn(6, 9).t(), setting.randn(1, 6)
    with setting.active():
        assert torch.equal(copy_rows(target, column.expand(9, 6)), column.expand(9, 6))
