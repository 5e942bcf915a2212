"""Mistral 7B v0.1 to v0.3, Nemo, and other checkpoints of `model_type: mistral`."""

from transformers.models.mistral import modeling_mistral

from ..blocks import causal_lm_arch

ARCH = causal_lm_arch("mistral", modeling_mistral, "Mistral")
