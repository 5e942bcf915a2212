"""Qwen2 and Qwen2.5: Llama with biased query, key and value projections."""

from transformers.models.qwen2 import modeling_qwen2

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("qwen2", modeling_qwen2, "Qwen2")
