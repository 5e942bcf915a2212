"""Qwen2 and Qwen2.5: Llama with biased query, key and value projections."""

from transformers.models.qwen2 import modeling_qwen2

from ..arch import Arch
from ..blocks import decoder_classes

ARCH = Arch(model_type="qwen2", classes=decoder_classes(modeling_qwen2, "Qwen2"))
