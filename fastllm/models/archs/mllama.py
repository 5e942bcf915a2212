"""Llama 3.2 Vision: the decoder of Llama 3.1, with layers in between that attend to an image's features.

Those layers run transformers' own forward with a fused MLP. Most blocks of the vision tower have LayerNorm and an MLP
without a gate, and attend to whole images through a mask of their tiles; the last few, whose halves are scaled by
trained gates, run transformers' own forward.
"""

from transformers.models.mllama import modeling_mllama

from ..blocks import decoder_classes
from ..vision_language import vision_language_arch
from ..vision_tower import BlockNames, vision_classes

ARCH = vision_language_arch(
    "mllama", modeling_mllama.MllamaForConditionalGeneration,
    decoder_classes(
        modeling_mllama, "MllamaText",
        names={"Attention": "MllamaTextSelfAttention", "DecoderLayer": "MllamaSelfAttentionDecoderLayer"},
    ),
    vision=vision_classes(
        modeling_mllama, "MllamaVisionEncoderLayer",
        BlockNames("input_layernorm", "self_attn", "post_attention_layernorm", output="o_proj"),
    ),
)  # fmt: skip
