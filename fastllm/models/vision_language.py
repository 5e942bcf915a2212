"""What vision-language families share: a known language decoder under a head whose loss takes images along."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from .._compat import composes_angles
from .arch import Arch
from .blocks import decoder_classes, model_class
from .image_layout import inner_model_class
from .row_positions import MultimodalPositions
from .vision_tower import BlockNames, vision_classes

_QWEN_BLOCK = BlockNames("norm1", "attn", "norm2", qkv=("qkv",), output="proj")


def vision_language_arch(
    model_type: str,
    original: Any,
    decoder: Mapping[type, type] | None = None,
    row_positions: Callable[[Any], Any] | None = None,
    vision: Mapping[type, type] | None = None,
    inner: Mapping[type, type] = {},
) -> Arch:
    """The record of `original`, e.g. `LlavaForConditionalGeneration`. Without `decoder`: around any known decoder;
    without `vision`: behind any known vision tower. `inner`: fast classes of what stands between.

    `row_positions` of a model counts the positions of rows that are laid end to end, for a collator; None for a family
    whose rows could not be kept apart.
    """
    model = model_class(original)
    fast: Any = model[original]
    # generate() reads from the signature which inputs the model takes.
    fast.forward = functools.wraps(original.forward)(fast.forward)
    # The fused loss divides by the tokens of the whole optimiser batch; transformers' is left to average.
    fast.accepts_loss_kwargs = True
    fast.row_positions = None if row_positions is None else property(row_positions)
    return Arch(model_type, {**model, **inner}, decoder, layers="model.language_model.layers", vision=vision)


def qwen_vl_arch(
    model_type: str,
    module: Any,
    prefix: str,
    *,
    text_prefix: str,
    hands_on: bool = True,
    lays_out_images: bool = True,
    names: Mapping[str, str] = {},
) -> Arch | None:
    """The record of a Qwen-VL family, whose tokens have three positions each, or None where its layers would have to
    compose the rotary angles themselves. `hands_on`: layers and blocks give what they compute to the next one only.
    `lays_out_images`: what the tower computes from the sizes of images is what `image_layout.py` knows."""
    if not composes_angles(getattr(module, f"{text_prefix}RotaryEmbedding")):
        return None
    decoder = decoder_classes(module, text_prefix, names=names, hands_on=hands_on)
    vision = vision_classes(module, f"{prefix}VisionBlock", _QWEN_BLOCK, hands_on=hands_on)
    original, inner = getattr(module, f"{prefix}ForConditionalGeneration"), getattr(module, f"{prefix}Model")
    return vision_language_arch(
        model_type, original, decoder, lambda model: MultimodalPositions(inner, model.config), vision,
        inner_model_class(inner) if lays_out_images else {},
    )  # fmt: skip
