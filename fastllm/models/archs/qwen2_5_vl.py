"""Qwen2.5-VL: the decoder of Qwen2 with rotary angles from three positions a token, which reach its layers composed.

The blocks of its vision tower have RMSNorm and a gated MLP; most attend inside windows, a few inside whole images.
"""

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from ..vision_language import qwen_vl_arch

ARCH = qwen_vl_arch(
    "qwen2_5_vl", modeling_qwen2_5_vl, "Qwen2_5_VL", text_prefix="Qwen2_5_VL", names={"MLP": "Qwen2MLP"}
)
