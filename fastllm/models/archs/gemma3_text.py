"""Gemma 3 (text): norms before and after each half of a layer and on each head; five windowed layers to one that sees
everything, each kind with rotary angles of its own; a residual stream that passes the range of fp16."""

from transformers.models.gemma3 import modeling_gemma3

from ..blocks import causal_lm_arch, embedding_class

ARCH = causal_lm_arch(
    "gemma3_text", modeling_gemma3, "Gemma3", norm_offset=1.0,
    more=embedding_class(modeling_gemma3.Gemma3TextScaledWordEmbedding),
)  # fmt: skip
