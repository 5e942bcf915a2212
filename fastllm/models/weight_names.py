"""How the tensors of a checkpoint relate to those of the model that transformers makes of it.

For most architectures the names are the same. Where transformers renames on loading, or stacks the experts of a layer
into one tensor, its own conversion table says how; what this module can't follow exactly it answers with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .weight_edits import Part


def empty_twin(model: Any) -> Any:
    """The plain transformers model of the same configuration, unquantized, without adapters, on the meta device."""
    original = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("fastllm"))
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return original(config)


def stored_names(twin: Any) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that transformers would write for the model."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = tied_weights(twin)
    state = {name: tensor for name, tensor in twin.state_dict().items() if name not in tied}
    return {name: tensor.shape for name, tensor in revert_weight_conversion(twin, state).items()}


def tied_weights(twin: Any) -> dict[str, str]:
    """Name of each weight that is the same as another one -> the name of that other one."""
    return dict(twin.all_tied_weights_keys)


@dataclass(frozen=True)
class NameMap:
    """`parts` by stored name; `unknown` are loaded names whose stored tensors are combined in a way that is not
    followed, with the reason."""

    parts: dict[str, Part] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def map_names(twin: Any, shapes: Mapping[str, Iterable[int]]) -> NameMap:
    """Where each tensor of a checkpoint, given by name and shape, ends up in the model.

    Stored tensors that the model has no place for are in neither table.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(twin)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    loaded = twin.state_dict()
    found = NameMap()
    for stored, shape in shapes.items():
        name, pattern = rename_source_key(stored, renamings, converters, twin.base_model_prefix, loaded)  # pyright: ignore[reportArgumentType]
        if name not in loaded:
            continue
        if pattern is None:
            found.parts[stored] = Part(name)
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        part = _expert_part(converter, pattern, stored, tuple(shape), name)
        if isinstance(part, Part):
            found.parts[stored] = part
        else:
            found.unknown[name] = part
    return found


def _expert_part(converter: Any, pattern: str, stored: str, shape: tuple[int, ...], name: str) -> Part | str:
    """The place of one expert's matrix in the stack [experts, rows, columns] that transformers builds of all."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)") + r"$", stored)
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or expert is None:
        applied = ", ".join(kind for kind, _ in operations)
        return f"transformers makes it of several stored tensors ({applied}), which a merge can't take apart"
    start = converter.source_patterns.index(pattern) * shape[0]
    return Part(name, int(expert[1]), start, start + shape[0])
