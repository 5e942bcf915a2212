"""Gemma 3 with its vision tower. The tokens of an image see each other, through a mask that transformers makes."""

from transformers.models.gemma3 import modeling_gemma3

from ..vision_language import vision_language_arch
from .gemma3_text import ARCH as TEXT

ARCH = vision_language_arch("gemma3", modeling_gemma3.Gemma3ForConditionalGeneration, TEXT.decoder)
