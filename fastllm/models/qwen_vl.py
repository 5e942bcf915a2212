"""What the Qwen-VL families share: a Qwen2 decoder under a head whose loss takes images along, and a fast tower."""

from __future__ import annotations

import functools
from typing import Any

from .._compat import composes_angles
from .arch import Arch
from .blocks import decoder_classes
from .row_positions import MultimodalPositions
from .vision_tower import vision_classes


def qwen_vl_arch(model_type: str, module: Any, prefix: str) -> Arch | None:
    """The record of one family, or None where its layers would have to compose the rotary angles themselves."""
    if not composes_angles(getattr(module, f"{prefix}RotaryEmbedding")):
        return None
    model_class = getattr(module, f"{prefix}ForConditionalGeneration")
    classes = decoder_classes(module, prefix, names={"MLP": "Qwen2MLP", "ForCausalLM": model_class.__name__})
    fast: Any = classes[model_class]
    # generate() reads from the signature which inputs the model takes.
    fast.forward = functools.wraps(model_class.forward)(fast.forward)
    # The fused loss divides by the tokens of the whole optimiser batch; transformers' is left to average.
    fast.accepts_loss_kwargs = True
    # A collator that lays rows end to end asks for it.
    fast.row_positions = property(lambda self: MultimodalPositions(type(self.model), self.config))
    return Arch(
        model_type=model_type,
        classes=classes | vision_classes(module, f"{prefix}VisionBlock"),
        layers="model.language_model.layers",
        vision_blocks="model.visual.blocks",
    )
