"""Mistral 7B v0.1 to v0.3, Nemo, and other checkpoints of `model_type: mistral`."""

from transformers.models.mistral import modeling_mistral

from ..arch import Arch
from ..blocks import decoder_classes

ARCH = Arch(model_type="mistral", classes=decoder_classes(modeling_mistral, "Mistral"))
