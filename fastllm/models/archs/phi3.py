"""Phi-3, Phi-3.5 and Phi-4 (text): Llama with q, k and v from one matrix, and gate and up from another."""

from transformers.models.phi3 import modeling_phi3

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("phi3", modeling_phi3, "Phi3")
