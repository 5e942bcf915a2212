"""Gemma 3 (text): norms before and after each half of a layer and on each head; five windowed layers to one that sees
everything, each kind with rotary angles of its own."""

from transformers.models.gemma3 import modeling_gemma3

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("gemma3_text", modeling_gemma3, "Gemma3", norm_offset=1.0)
