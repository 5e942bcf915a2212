"""Qwen2-VL: the decoder of Qwen2 with rotary angles from three positions a token, which reach its layers composed.

The blocks of its vision tower have LayerNorm and an MLP without a gate.
"""

from transformers.models.qwen2_vl import modeling_qwen2_vl

from ..vision_language import qwen_vl_arch

ARCH = qwen_vl_arch("qwen2_vl", modeling_qwen2_vl, "Qwen2VL", text_prefix="Qwen2VL", names={"MLP": "Qwen2MLP"})
