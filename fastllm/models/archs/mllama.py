"""Llama 3.2 Vision: the decoder of Llama 3.1, with layers in between that attend to an image's features.

Those layers run transformers' own forward with a fused MLP; so does the vision tower, without one.
"""

from transformers.models.mllama import modeling_mllama

from ..blocks import decoder_classes
from ..vision_language import vision_language_arch

ARCH = vision_language_arch(
    "mllama", modeling_mllama.MllamaForConditionalGeneration,
    decoder_classes(
        modeling_mllama, "MllamaText",
        names={"Attention": "MllamaTextSelfAttention", "DecoderLayer": "MllamaSelfAttentionDecoderLayer"},
    ),
)  # fmt: skip
