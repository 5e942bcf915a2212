"""Gemma 2: norms before and after each half of a layer, capped scores and logits, every other layer windowed."""

from transformers.models.gemma2 import modeling_gemma2

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("gemma2", modeling_gemma2, "Gemma2", norm_offset=1.0, caps_scores=True)
