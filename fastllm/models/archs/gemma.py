"""Gemma 1, CodeGemma and checkpoints like them: Llama with norm weights stored as their distance from one."""

from transformers.models.gemma import modeling_gemma

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("gemma", modeling_gemma, "Gemma", norm_offset=1.0)
