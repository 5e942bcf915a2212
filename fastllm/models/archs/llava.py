"""LLaVA 1.5 and Pixtral 12B, which are one class in transformers: any known vision tower before any known language
decoder.
"""

from transformers.models.llava import modeling_llava

from ..row_positions import text_positions
from ..vision_language import vision_language_arch

ARCH = vision_language_arch(
    "llava", modeling_llava.LlavaForConditionalGeneration, row_positions=lambda model: text_positions
)
