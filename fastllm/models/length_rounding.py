"""Small batches made a little longer, so that their shapes come again: recordings of launches hold for one shape."""

from __future__ import annotations

from typing import Any

import torch

from .recordings import MOST_ROWS, Recordings

# Lengths are rounded up to a multiple of this.
_MULTIPLE = 64
# Inputs with an entry for each token, and those that are there for images and videos.
_OF_TOKENS = ("input_ids", "mm_token_type_ids")
_OF_IMAGES = frozenset(
    {"pixel_values", "image_grid_thw", "image_sizes", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"}
)


def lengthen(inputs: dict[str, Any], config: Any, recordings: Recordings) -> None:
    """Append text tokens to the `input_ids` [B, S] of a decoder, where the GPU has time for them and nothing but the
    tokens says what they are: no mask, positions or embeddings. Causal attention never lets the others see them; their
    hidden states are the caller's to drop."""
    given = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if any(inputs.get(name) or getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return
    if _angles_know_the_length(config) or "input_ids" not in given or not given <= _OF_IMAGES.union(_OF_TOKENS):
        return
    rows, length = inputs["input_ids"].shape
    comes_again, recordings.last_batch = recordings.last_batch == (rows, length), (rows, length)
    if comes_again:  # as it is
        return
    padded = -(-length // _MULTIPLE) * _MULTIPLE
    if padded == length or rows * padded > MOST_ROWS:
        return
    if torch.is_grad_enabled() and recordings.waits_for_host("decoder", rows * padded, inputs["input_ids"].device):
        fillers = {"input_ids": _text_token(config), "mm_token_type_ids": 0}
        for name in given.intersection(_OF_TOKENS):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, padded - length), value=fillers[name])


def _angles_know_the_length(config: Any) -> bool:
    """Whether RoPE depends on how long a batch is."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return any(part.get("rope_type") == "dynamic" for part in kinds)


def _text_token(config: Any) -> int:
    """A token that stands for no image."""
    special = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    return next(token for token in range(len(special) + 1) if token not in special)
