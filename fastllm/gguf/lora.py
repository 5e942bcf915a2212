"""A LoRA adapter as a GGUF file of its own, which llama.cpp adds to the base model when it runs.

For a base matrix W the file has `<name>.lora_a` [r, in] and `<name>.lora_b` [out, r]; llama.cpp computes
W + (alpha / r) * b @ a with the one alpha of the file. Source: llama.cpp's llama-adapter.cpp.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._errors import UnsupportedError, nearest
from .._notices import notice
from .architectures import Layout, architecture_of
from .container import GGUFError, Value, lay_out
from .export import canonical_name, is_vision
from .quantizers import quantizer_of
from .recipes import fitting_type
from .tensor_types import tensor_type
from .writer import gguf_writer

_PEFT_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
_MERGE = 'model.save_pretrained_merged(folder, tokenizer, save_method="merged_16bit"), then export that'


@dataclass(slots=True)
class _Pair:
    """One adapted module: A [r, in], B [out, r] and the factor on B @ A."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def write_lora_gguf(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    adapter_config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    quantization: str = "f16",
    name: str | None = None,
) -> None:
    """Write the PEFT adapter (`adapter_config.json` and its tensors, by PEFT's names) for the base model of `config`.

    `quantization` is f32, f16, bf16 or q8_0; factors whose rows do not hold whole blocks of it become f16.

    Raises `UnsupportedError` for what such a file can't express: DoRA, trained biases, embeddings or whole modules.
    """
    architecture, model = architecture_of(config)
    _require_expressible(adapter_config)
    kind = tensor_type(quantization)
    pairs = _placed(architecture.layout(model), _pairs(adapter_config, tensors))
    # Scaling is alpha / r with one alpha in the file; where modules differ, the rest goes into B.
    first = next(iter(pairs.values()))
    alpha = first.scaling * first.a.shape[0]
    factors: dict[str, torch.Tensor] = {}
    for target, pair in pairs.items():
        rest = pair.scaling * pair.a.shape[0] / alpha
        factors[f"{target}.lora_a"] = pair.a
        factors[f"{target}.lora_b"] = pair.b if math.isclose(rest, 1) else pair.b.float() * rest
    metadata: dict[str, Value] = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "general.name": name or Path(path).stem,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    table = lay_out((tensor, tuple(f.shape), fitting_type(kind, f.shape[-1])) for tensor, f in factors.items())
    with gguf_writer(path, metadata, table) as file:
        for info in table:
            file.write(info.name, quantizer_of(info.type).encode(factors[info.name]))


def _require_expressible(adapter_config: Mapping[str, Any]) -> None:
    refused = {
        "use_dora": "DoRA rescales the columns of the whole weight",
        "modules_to_save": "whole modules were trained",
        "trainable_token_indices": "embedding rows were trained",
        "target_parameters": "parameters that are not in a linear layer were adapted",
        "fan_in_fan_out": "weights are stored transposed",
    }
    for key, reason in refused.items():
        if adapter_config.get(key):
            raise UnsupportedError(f"{key}: {reason}, which a LoRA GGUF file can't say", where="adapter", fix=_MERGE)
    if adapter_config.get("bias", "none") != "none":
        raise UnsupportedError("biases were trained, which a LoRA GGUF file can't say", where="adapter", fix=_MERGE)


def _pairs(adapter_config: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, _Pair]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for peft_name, tensor in tensors:
        if peft_name.endswith(".base_layer.weight"):
            notice(f"fastllm: {peft_name}, PEFT's copy of a base weight, is not in the LoRA file")
            continue
        match = _PEFT_NAME.match(peft_name)
        if match is None:
            raise UnsupportedError(f"{peft_name!r} is not a LoRA factor of a linear layer", where="adapter", fix=_MERGE)
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise GGUFError("the adapter has no tensors")
    pairs = {}
    for module, factors in sides.items():
        if len(factors) != 2 or factors["A"].shape[0] != factors["B"].shape[1]:
            raise GGUFError("lora_A and lora_B do not belong together", where=module)
        pairs[module] = _Pair(factors["A"], factors["B"], _scaling(adapter_config, module, factors["A"].shape[0]))
    return pairs


def _scaling(adapter_config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's factor: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); patterns name modules by suffix."""
    alpha = float(adapter_config["lora_alpha"])
    for pattern, value in (adapter_config.get("alpha_pattern") or {}).items():
        if re.fullmatch(r"[\w.]+", pattern) is None:
            raise UnsupportedError(f"alpha_pattern {pattern!r} is not a module name", where="adapter", fix=_MERGE)
        if f".{module}".endswith(f".{pattern}"):
            alpha = float(value)
    return alpha / math.sqrt(rank) if adapter_config.get("use_rslora") else alpha / rank


def _placed(layout: Layout, pairs: dict[str, _Pair]) -> dict[str, _Pair]:
    """Pairs by GGUF tensor name, with B changed as the rows of the base weight are."""
    placed = {}
    for module, pair in pairs.items():
        source = f"{canonical_name(module)}.weight"
        targets = layout.targets.get(source)
        if targets is None and is_vision(source):
            raise UnsupportedError(
                f"the adapter changes the vision part ({module!r}), which llama.cpp's adapters do not reach",
                where="adapter",
                fix="train with finetune_vision_layers=False, or save the merged model with its mmproj file",
            )
        if targets is None:
            raise UnsupportedError(
                f"the base model's GGUF file has no place for {module!r} {nearest(source, layout.targets)}".rstrip(),
                where="adapter",
                fix=_MERGE,
            )
        for target in targets:
            if target.name == "token_embd.weight" or target.expert is not None:
                raise UnsupportedError(
                    f"an adapted {module!r} can't be in a LoRA GGUF file", where="adapter", fix=_MERGE
                )
            b = target.change(pair.b)
            if (b.shape[0], pair.a.shape[1]) != layout.shapes[target.name]:
                raise GGUFError(f"the adapter's factors do not fit {layout.shapes[target.name]}", where=module)
            placed[target.name] = _Pair(pair.a, b, pair.scaling)
    return placed
