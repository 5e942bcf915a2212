"""Packed rows on their way through a transformers decoder: as documents, not as a dense mask.

transformers would make a [B, 1, S, S] mask for rows whose positions restart, or that are longer than the sliding
window, and hand it to every layer. Here the layers get `documents` among their keyword arguments instead, found once
in a forward.
"""

from __future__ import annotations

from typing import Any

import torch

from .._errors import DataError
from ..kernels.documents import Documents

# How collators for packed rows name the boundaries that they know already.
_OFFSETS, _LONGEST = "cu_seq_lens_q", "max_length_q"
_GIVEN_BOUNDARIES = (_OFFSETS, "cu_seq_lens_k", _LONGEST, "max_length_k")


def keep_documents_apart(config: Any, inputs: dict[str, Any]) -> None:
    """Put `documents` into the inputs of a decoder, where its rows hold several or its window is shorter than they are.

    Also where transformers would make a mask for the sake of its eager attention alone, and in a step of a text model,
    of whose plain rows transformers would have the device say that they are not packed. Left alone: inputs with a mask,
    which rules, those with a cache or with images whose tokens see each other, and attention implementations that read
    the boundaries themselves. Packed rows get no cache, since nothing can be generated from one.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    is_dense = config._attn_implementation in ("sdpa", "eager")
    has_cache = inputs.get("use_cache") or inputs.get("past_key_values") is not None
    if tokens is None or not is_dense or has_cache or inputs.get("attention_mask") is not None:
        return
    kinds = inputs.get("token_type_ids")  # of Gemma 3: 1 in an image
    if kinds is not None and bool((kinds == 1).any()):
        return
    batch, length = tokens.shape[:2]
    documents = _packed_documents(inputs, batch, length, tokens.device)
    if documents is None and inputs.get("use_cache") is False:
        text = config.get_text_config()
        window = getattr(text, "sliding_window", None)
        needs_mask = config._attn_implementation == "eager" or (window and window < length)
        documents = Documents.whole_rows(batch, length, tokens.device) if needs_mask or text is config else None
    if documents is None:
        return
    for name in _GIVEN_BOUNDARIES:
        inputs.pop(name, None)
    # transformers passes a 4-D mask on as it is. This one has no element, so whoever would read it fails.
    inputs |= {"documents": documents, "use_cache": False, "attention_mask": tokens.new_empty((1, 1, 0, 0)).bool()}


def window_of(attention_module: Any) -> int:
    """The sliding window of an attention layer, 0 where it sees everything. Mistral has one for all, in its config."""
    config = attention_module.config
    return getattr(attention_module, "sliding_window", getattr(config, "sliding_window", None)) or 0


def mask_of_documents(documents: Documents, attention_module: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """The dense mask [B, 1, S, S] of causal documents that transformers' own attention wants; None where it sees as
    much by itself."""
    window = window_of(attention_module)
    is_eager = attention_module.config._attn_implementation == "eager"
    if not (is_eager or documents.is_packed or 0 < window < documents.length):
        return None
    seen = documents.on(hidden_states.device).mask(window)
    return attention_mask(seen, attention_module, hidden_states.dtype)


def attention_mask(seen: torch.Tensor, attention_module: Any, dtype: torch.dtype) -> torch.Tensor:
    """What each query sees, bool [B, 1, S, S], as transformers' attention takes it: bool, or additive for its eager
    one."""
    if attention_module.config._attn_implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _packed_documents(inputs: dict[str, Any], batch: int, length: int, device: torch.device) -> Documents | None:
    """From the boundaries that a collator gives for a single row, else from positions that restart."""
    offsets, positions = inputs.get(_OFFSETS), inputs.get("position_ids")
    if offsets is not None and batch == 1:
        return _given_documents(offsets, inputs.get(_LONGEST), length, device)
    if positions is not None and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # the text's, before those of M-RoPE
    if positions is None or positions.dim() != 2 or positions.shape[-1] != length or length < 2:
        return None
    return Documents.from_position_ids(positions, batch)


def _given_documents(
    offsets: torch.Tensor, longest: int | torch.Tensor | None, length: int, device: torch.device
) -> Documents | None:
    if offsets.device.type == "cpu" and (int(offsets[0]) != 0 or int(offsets[-1]) != length):
        raise DataError(
            f"it goes from {int(offsets[0])} to {int(offsets[-1])}, the row has {length} tokens",
            where=_OFFSETS,
            fix="give the offset of each document's first token and, at the end, the row's length",
        )
    if offsets.numel() <= 2:
        return None
    longest = int(offsets.diff().max() if longest is None else longest)
    return Documents(offsets.to(device, torch.int32), longest, 1, length)
