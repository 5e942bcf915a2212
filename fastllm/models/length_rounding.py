"""Small batches made a little longer, so that their shapes come again: recordings of launches hold for one shape."""

from __future__ import annotations

from typing import Any

import torch

from .recordings import MOST_ROWS, Recordings

# Lengths are rounded up to a multiple of this. A batch that is launched from recordings waits for the host, not for the
# arithmetic of these tokens.
_MULTIPLE = 64


def lengthen(inputs: dict[str, Any], config: Any, recordings: Recordings) -> None:
    """Append padding to the `input_ids` [B, S] of a decoder, where its layers are recorded and nothing but the tokens
    says what they are: no mask, positions, embeddings or images. Causal attention never sees it; its hidden states are
    the caller's to drop."""
    given = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
    if any(inputs.get(name) or getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return
    if given != ["input_ids"] or not torch.is_grad_enabled() or not recordings.serves("decoder"):
        return
    tokens = inputs["input_ids"]
    rows, length = tokens.shape
    padded = -(-length // _MULTIPLE) * _MULTIPLE
    if padded != length and rows * padded <= MOST_ROWS:
        inputs["input_ids"] = torch.nn.functional.pad(tokens, (0, padded - length))
