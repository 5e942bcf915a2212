"""Micro-batches of gradient accumulation that are too small to fill a GPU, merged into larger ones.

A forward of few tokens is bound by kernel launches and by reading the weights, so N micro-batches cost N times what
one of as many rows costs. An optimiser step sees the same rows in the same order either way, and its loss is the sum
over their tokens by the number of them, so the same step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._device import free_bytes
from .._notices import notice
from .arch import arch_of
from .fused_parts import fused_layer
from .memory import ActivationPlanner, LayerBytes
from .model_methods import MERGES_MICRO_BATCHES, PLANNER
from .patch import decoder_layers

# Tokens in a forward from which on its arithmetic takes the time, by the kind of device. A CPU is never short of them.
_ENOUGH_TOKENS = {"cuda": 4096, "xpu": 4096}
# Part of the free memory that a merged batch may take with nothing recomputed.
_SHARE_OF_MEMORY = 0.5


def merge_micro_batches(trainer: Any, base: Any) -> None:
    """Give an SFT trainer larger and fewer micro-batches, where those it has are small and memory is free."""
    args = trainer.args
    if getattr(base, MERGES_MICRO_BATCHES, False) and _keeps_its_steps(trainer, base):
        merged = _how_many(trainer.train_dataset, args, base)
        if merged > 1:
            rows = args.per_device_train_batch_size
            args.per_device_train_batch_size = rows * merged
            args.gradient_accumulation_steps //= merged
            trainer._train_batch_size = args.train_batch_size
            notice(
                f"fastllm: {merged} micro-batches of {rows} run as one of {rows * merged}, since they are small: the "
                "same optimiser steps. from_pretrained(..., merge_micro_batches=False) leaves them apart"
            )


def _keeps_its_steps(trainer: Any, base: Any) -> bool:
    """Whether merging leaves each optimiser step what it is, and memory to the planner."""
    args, planner = trainer.args, getattr(base, PLANNER, None)
    is_planned = isinstance(planner, ActivationPlanner) and planner.setting == "fastllm"
    draws_masks = any(isinstance(module, nn.Dropout) and module.p > 0 for module in trainer.model.modules())
    counts_rows = args.dataloader_drop_last or args.auto_find_batch_size or args.accelerator_config.split_batches
    return is_planned and trainer.model_accepts_loss_kwargs and not draws_masks and not counts_rows


def _how_many(dataset: Any, args: Any, base: Any) -> int:
    """The most micro-batches, a divisor of the accumulation steps, that one forward can take."""
    steps, rows = args.gradient_accumulation_steps, args.per_device_train_batch_size
    enough = _ENOUGH_TOKENS.get(base.device.type, 0)
    lengths = _lengths(dataset, args.max_length) if steps > 1 and enough else []
    if not lengths:
        return 1
    fitting = _tokens_in_memory(base)
    for count in range(steps, 1, -1):
        larger = count * rows
        if steps % count == 0 and _padded_tokens(lengths, larger) <= enough and larger * lengths[-1] <= fitting:
            return count
    return 1


def _lengths(dataset: Any, longest: int | None) -> list[int]:
    """Tokens of each row as they will be trained, ascending; empty for a data set that is read as it comes."""
    if not hasattr(dataset, "__len__") or "input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return []
    from pyarrow.compute import call_function

    batches = dataset.select_columns("input_ids").with_format("arrow").iter(10_000)
    counts = (call_function("list_value_length", [batch["input_ids"]]) for batch in batches)
    lengths = sorted(length for count in counts for length in count.to_pylist())
    return lengths if longest is None else [min(length, longest) for length in lengths]


def _padded_tokens(lengths: Sequence[int], rows: int) -> float:
    """Tokens of a batch of `rows` drawn from `lengths`, as long as its longest is expected to be."""
    return rows * lengths[min(len(lengths) - 1, len(lengths) * rows // (rows + 1))]


def _tokens_in_memory(base: Any) -> int:
    """Tokens whose activations fit in a share of the free memory with nothing recomputed."""
    arch = arch_of(base.config)
    layers = decoder_layers(base, arch) if arch is not None else []
    layer = fused_layer(layers[0]) if layers else "no decoder layers are known"
    if isinstance(layer, str):
        return 0
    sizes = LayerBytes.of(layer, _training_dtype(base))
    planner: ActivationPlanner = getattr(base, PLANNER)
    budget = _SHARE_OF_MEMORY * (free_bytes(base.device) - planner.reserved_bytes) - sizes.weights
    return max(0, int(budget // (len(layers) * (sizes.stash + sizes.layer_input) + sizes.backward)))


def _training_dtype(base: Any) -> torch.dtype:
    return base.dtype if base.dtype.itemsize == 2 else torch.float32
