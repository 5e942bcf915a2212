"""The tower of CLIP, which LLaVA 1.5 sees with: LayerNorm, an MLP without a gate, rows that see themselves whole."""

from transformers.models.clip import modeling_clip

from ..vision_tower import BlockNames, vision_classes

CLASSES = vision_classes(modeling_clip, "CLIPEncoderLayer", BlockNames("layer_norm1", "self_attn", "layer_norm2"))
