"""Rows of a table in host memory."""

import gc

import pytest
import torch

from fastllm.kernels.host_rows import host_table, is_readable, read_rows

from .parity import Setting

# (rows of the table, their width, shape of the indices)
SHAPES = {"batch": (11, 40, (2, 3)), "wide": (3, 5000, (4,)), "odd": (7, 1, (1, 1)), "none": (5, 8, (0, 3))}


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_the_table_s(setting: Setting, shape: str):
    height, width, indices_shape = SHAPES[shape]
    table = host_table(setting.randn(height, width))
    indices = torch.randint(height, indices_shape, device=setting.device)
    with setting.active():
        rows = read_rows(table, indices)
    assert table.device.type == "cpu" and rows.device.type == setting.device.type
    assert torch.equal(rows.cpu(), table[indices.cpu()])


def test_indices_of_any_strides(fp32: Setting):
    table = host_table(fp32.randn(9, 16))
    indices = torch.randint(9, (4, 6), device=fp32.device).t()[::2]
    with fp32.active():
        assert torch.equal(read_rows(table, indices).cpu(), table[indices.cpu()])


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_of_the_table_fails(fp32: Setting, index: int):
    if fp32.device.type == "cuda":
        pytest.skip("a failed assertion on the device ends the process")
    with fp32.active(), pytest.raises((RuntimeError, IndexError), match=r"outside of the table|out of range"):
        read_rows(host_table(fp32.randn(5, 4)), torch.tensor([0, index]))


@pytest.mark.gpu
def test_pages_are_locked_for_as_long_as_anybody_holds_them():
    table = host_table(torch.randn(1000, 64))
    device, row = torch.device("cuda"), table[3].clone()
    assert is_readable(table, device) and not is_readable(table.clone(), device)
    view = table[3]
    del table
    gc.collect()
    assert view.is_pinned() and torch.equal(view, row)
    address = view.data_ptr()
    del view
    gc.collect()
    again = host_table(torch.randn(1000, 64))  # often the same pages, which could not be locked twice
    assert again.is_pinned(), f"pages at {address:#x} are still locked"
