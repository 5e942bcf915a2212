"""Positions of rows that are laid end to end in one: each as it would be alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_MEDIA = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def text_positions(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[B, S] of rows padded on the right, for decoders that count images as text."""
    return batch["attention_mask"].cumsum(-1) - 1


@dataclass(frozen=True)
class MultimodalPositions:
    """Positions as transformers' Qwen-VL decoders take them for packed rows: those of the text, by which rows are told
    apart, before the temporal, height and width ones of M-RoPE.

    It has no weights, so a collator can take it along to the processes of a data loader.

    Args:
        model_class: the class whose `get_rope_index` counts, e.g. `Qwen2_5_VLModel`.
        config: the whole model's.
    """

    model_class: Any
    config: Any

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[4, B, S] of rows padded on the right, each as it would be alone. Padding has no meaningful position."""
        text = text_positions(batch)[None]
        media = {name: batch[name] for name in _MEDIA if name in batch}
        if not media:
            return text.expand(4, -1, -1)
        # get_rope_index reads the config and nothing else of its model.
        model = self.model_class.__new__(self.model_class)
        model.config = self.config
        spatial, _ = model.get_rope_index(
            batch["input_ids"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            attention_mask=batch["attention_mask"],
            **media,
        )
        return torch.cat([text, spatial])
