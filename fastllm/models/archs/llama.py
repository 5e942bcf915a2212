"""Llama 2 and 3.x, and every checkpoint that says `model_type: llama` (TinyLlama, Yi, Vicuna, SmolLM2 ...)."""

from transformers.models.llama import modeling_llama

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("llama", modeling_llama, "Llama")
