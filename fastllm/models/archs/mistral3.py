"""Mistral Small 3.1 and 3.2: the vision tower of Pixtral, merged patches, and the decoder of Mistral."""

from transformers.models.mistral3 import modeling_mistral3

from ..row_positions import text_positions
from ..vision_language import vision_language_arch

ARCH = vision_language_arch(
    "mistral3", modeling_mistral3.Mistral3ForConditionalGeneration, row_positions=lambda model: text_positions
)
