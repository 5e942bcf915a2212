"""The tower of SigLIP, which Gemma 3 sees with: LayerNorm, an MLP without a gate, rows that see themselves whole."""

from transformers.models.siglip import modeling_siglip

from ..vision_tower import BlockNames, vision_classes

CLASSES = vision_classes(modeling_siglip, "SiglipEncoderLayer", BlockNames("layer_norm1", "self_attn", "layer_norm2"))
