"""Qwen3 (dense): Llama with an RMSNorm on each query and key head."""

from transformers.models.qwen3 import modeling_qwen3

from ..arch import Arch
from ..blocks import decoder_classes

ARCH = Arch(model_type="qwen3", classes=decoder_classes(modeling_qwen3, "Qwen3"))
