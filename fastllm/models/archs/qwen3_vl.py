"""Qwen3-VL (dense): the decoder of Qwen3 with rotary angles from three positions a token, interleaved.

Features from inside the vision tower are added between the first layers, which transformers' decoder does. The blocks
of its vision tower have LayerNorm and an MLP without a gate.
"""

from transformers.models.qwen3_vl import modeling_qwen3_vl

from ..vision_language import qwen_vl_arch

ARCH = qwen_vl_arch(
    "qwen3_vl", modeling_qwen3_vl, "Qwen3VL", text_prefix="Qwen3VLText", hands_on=False, lays_out_images=False
)
