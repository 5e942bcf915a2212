"""Dynamic 4-bit checkpoints: a bitsandbytes model of a chosen size in which the linear layers that 4 bits would hurt
most, byte for byte, stay in 16 bits.

What a layer would lose is the expected divergence of `gguf.sensitivity`, for the very rounding that is stored; the
bytes are spent by `gguf.allocation`. The choice is a `FourBitRecipe`: kept beside the model, and followed again without
any data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._errors import ArgumentError, ModelError
from .._notices import notice
from ..gguf.allocation import allocate_types
from ..gguf.sensitivity import expected_divergence
from .calibration import CalibrationData, Moments, calibrate
from .checkpoints import header_size, parse_size
from .merge_plan import MergePlan, Weight
from .nf4_encoder import Nf4Encoder

RECIPE_FILE = "dynamic_4bit.recipe.json"
_FORMAT = "dynamic_4bit"
_FOUR_BIT, _SIXTEEN_BIT = "4-bit", "16-bit"
# Size where none is asked for, as a multiple of the model's with every layer in 4 bits.
_DEFAULT_GROWTH = 1.1


@dataclass(frozen=True)
class FourBitRecipe:
    """The linear layers that stay in 16 bits, by the name of the module. `notes` tell how they were found."""

    kept: tuple[str, ...]
    notes: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Into a folder that is not in place yet, so without a temporary name."""
        content = {"format": _FORMAT, "notes": dict(self.notes), "sixteen_bit_modules": list(self.kept)}
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FourBitRecipe:
        """Raises `ModelError` for a file that is not such a recipe."""
        try:
            content = json.loads(Path(path).read_bytes())
            kept = content["sixteen_bit_modules"]
            if content["format"] != _FORMAT or not all(isinstance(name, str) for name in kept):
                raise TypeError(f"its format is {content['format']!r}, not {_FORMAT!r}, or it names no modules")
            return cls(tuple(kept), content.get("notes", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"not a recipe of a 4-bit model: {error}", where=os.fspath(path),
                fix=f"pass the {RECIPE_FILE} of a folder that was saved with save_method={_FORMAT!r}",
            ) from error  # fmt: skip


@dataclass(frozen=True)
class FourBitRequest:
    """What to measure on and how large the model may be: in bits per weight, in bytes, or by default."""

    calibration: CalibrationData
    target_bpw: float | None = None
    max_size: int | str | None = None


def measured_recipe(model: Any, tokenizer: Any, plan: MergePlan, request: FourBitRequest) -> FourBitRecipe:
    """The recipe of least expected divergence for a model whose `plan` has every layer in 4 bits.

    Raises `ArgumentError` for a size that can't be reached, `DataError` for data that can't be read.
    """
    encoder = plan.encoder
    assert encoder is not None, "the plan stores nothing in 4 bits"
    budget = _budget(plan, request)
    moments = calibrate(model, tokenizer, request.calibration, gradients=True)
    costs, sizes = _measured(plan, encoder, moments, model.device)
    types = allocate_types(costs, sizes, budget - plan.num_bytes + sum(size[_FOUR_BIT] for size in sizes.values()))
    kept = tuple(module for module, kind in types.items() if kind == _SIXTEEN_BIT)
    num_bytes = plan.num_bytes + sum(sizes[module][_SIXTEEN_BIT] - sizes[module][_FOUR_BIT] for module in kept)
    notes = {
        "bytes": num_bytes,
        "bits_per_weight": round(8 * num_bytes / _num_weights(plan), 3),
        "expected_divergence": sum(costs[module][kind] for module, kind in types.items()),
        "expected_divergence_all_4bit": sum(cost[_FOUR_BIT] for cost in costs.values()),
        "calibration_tokens": moments.num_tokens,
    }
    return FourBitRecipe(kept, notes)


def _budget(plan: MergePlan, request: FourBitRequest) -> int:
    """Bytes of tensors that the model may have."""
    if request.target_bpw is not None and request.max_size is not None:
        raise ArgumentError("target_bpw and max_size both set the size", where=_FORMAT, fix="pass one of them")
    weights, headers = _num_weights(plan), _header_bytes(plan)
    if request.max_size is not None:
        budget = parse_size(request.max_size, where="max_size") - headers
    elif request.target_bpw is not None:
        budget = int(request.target_bpw * weights / 8)
    else:
        budget = int(_DEFAULT_GROWTH * plan.num_bytes)
    if budget < plan.num_bytes:
        raise ArgumentError(
            f"with every layer in 4 bits the model has {plan.num_bytes + headers:,} bytes,"
            f" {8 * plan.num_bytes / weights:.2f} bits per weight, and less is asked for",
            where="target_bpw" if request.target_bpw is not None else "max_size",
            fix='ask for more, or save_method="merged_4bit"',
        )  # fmt: skip
    return budget


def _num_weights(plan: MergePlan) -> int:
    return sum(math.prod(weight.entry.shape) for weight in plan.weights.values())


def _header_bytes(plan: MergePlan) -> int:
    """Of all files; at most, since a layer in 16 bits has fewer tensors than one in 4."""
    entries = ([e for name in names for e in plan.outputs(plan.weights[name])] for names in plan.files.values())
    return sum(header_size(file) for file in entries)


def _measured(
    plan: MergePlan, encoder: Nf4Encoder, moments: Moments, device: torch.device
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """(expected divergence, bytes) of each module in 4 and in 16 bits. Layers that the data has not reached are left
    out, and told of."""
    costs: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for stored, module in tqdm(encoder.modules.items(), desc="measuring layers", unit="layer", delay=1):
        name = f"{module}.weight"
        if name not in moments.gradients:
            continue
        weight = plan.weights[stored]
        cost = _cost(encoder, weight, moments.inputs[name], moments.gradients[name], device)
        costs[module] = {_FOUR_BIT: cost, _SIXTEEN_BIT: 0.0}
        four_bit = sum(entry.num_bytes for entry in encoder.entries(weight.entry))
        sizes[module] = {_FOUR_BIT: four_bit, _SIXTEEN_BIT: weight.entry.num_bytes}
    unseen = [module for module in encoder.modules.values() if module not in costs]
    if unseen:
        notice(f"fastllm: no calibration data went through {len(unseen)} layers, which are 4-bit: {unseen[0]}, ...")
    return costs, sizes


def _cost(
    encoder: Nf4Encoder, weight: Weight, columns: torch.Tensor, rows: torch.Tensor, device: torch.device
) -> float:
    values = torch.cat([block.float() for _, block in weight.merged(device)])
    change = encoder.rounded(weight.name, values) - values
    return expected_divergence(change, columns.to(device), rows.to(device))
