"""4-bit weights back to floats: the same bits as bitsandbytes."""

import pytest
import torch

from fastllm.kernels.nf4 import dequantize_nf4

from .parity import OverLimit, Setting
from .quantized import dequantized, quantize


def check_dequantize(setting: Setting, rows: int, columns: int, **options) -> None:
    weight = setting.randn(rows, columns, scale=0.02, dtype=torch.float32)
    plain, packed, state = quantize(weight, **options)
    with setting.active():
        ours = dequantize_nf4(plain, setting.dtype)
    theirs = dequantized(packed, state, setting.dtype)
    assert ours.dtype == setting.dtype and ours.shape == (rows, columns)
    different = ours.ne(theirs).sum().item()
    if different:
        raise OverLimit(f"{different} of {ours.numel()} values differ from bitsandbytes")


@pytest.mark.parametrize("is_nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    "shape",
    [(1, 64), (2, 64), (3, 128), (65, 192), (7, 96), (64, 1), (33, 100), (5, 10), (300, 256)],
    ids=str,
)
def test_same_bits_as_bitsandbytes(setting, shape, is_nested):
    """Also rows that end inside a block, and matrices whose last block is not full."""
    check_dequantize(setting, *shape, is_nested=is_nested)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
def test_types_and_block_sizes(setting, quant_type, blocksize):
    check_dequantize(setting, 9, 512, quant_type=quant_type, blocksize=blocksize)


def test_odd_number_of_weights(setting):
    """The last byte of a 3 x 5 matrix holds one value."""
    check_dequantize(setting, 3, 5, is_nested=False)


def test_into_columns_of_a_wider_buffer(setting):
    """The target's rows may be strided and its dtype decides; what lies beside it stays."""
    plain, packed, state = quantize(setting.randn(5, 128, dtype=torch.float32))
    wide = torch.full((5, 140), 7.0, dtype=setting.dtype, device=setting.device)
    with setting.active():
        out = dequantize_nf4(plain, torch.float64, out=wide[:, :128])
    assert out.data_ptr() == wide.data_ptr()
    assert wide[:, :128].equal(dequantized(packed, state, setting.dtype)) and (wide[:, 128:] == 7).all()


def test_rows_that_end_inside_a_block_into_a_wider_buffer(setting):
    plain, packed, state = quantize(setting.randn(6, 96, dtype=torch.float32))
    wide = torch.full((6, 100), 7.0, dtype=setting.dtype, device=setting.device)
    with setting.active():
        dequantize_nf4(plain, setting.dtype, out=wide[:, :96])
    assert wide[:, :96].equal(dequantized(packed, state, setting.dtype)) and (wide[:, 96:] == 7).all()


def test_zero_blocks(setting):
    """A block of zeros has absmax 0 and comes back as zeros."""
    weight = setting.randn(4, 128, dtype=torch.float32)
    weight[1] = 0
    plain, _, _ = quantize(weight, is_nested=False)
    with setting.active():
        assert not dequantize_nf4(plain, setting.dtype)[1].any()
