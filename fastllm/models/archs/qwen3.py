"""Qwen3 (dense): Llama with an RMSNorm on each query and key head."""

from transformers.models.qwen3 import modeling_qwen3

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("qwen3", modeling_qwen3, "Qwen3")
