"""Llama 2 and 3.x, and every checkpoint that says `model_type: llama` (TinyLlama, Yi, Vicuna, SmolLM2 ...)."""

from transformers.models.llama import modeling_llama

from ..arch import Arch
from ..blocks import decoder_classes

ARCH = Arch(model_type="llama", classes=decoder_classes(modeling_llama, "Llama"))
