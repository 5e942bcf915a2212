"""Dynamic quantization: a recipe made for one model, from what each tensor's types would cost it.

The divergences come from `sensitivity.expected_divergences` for the types that `candidates` names; the recipe that
`dynamic_recipe` makes of them is an `ExplicitRecipe`, which can be read, kept, and followed again without any data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .._errors import ArgumentError, UnsupportedError
from .allocation import allocate_types
from .container import align, data_bytes, encode_header
from .export import ExportPlan
from .recipes import ExplicitRecipe, fitting_type, may_quantize, static_mix
from .tensor_types import IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, TensorType, tensor_type

_PREFIX = "dynamic_"
_K_TYPES = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0)
_IQ_TYPES = (IQ4_XS, IQ4_NL)  # better for their size than Q4_K and slower to run
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def dynamic_base(name: str) -> str | None:
    """`q4_k_m` of `dynamic_q4_k_m`, in any case; None for another name. Raises `UnsupportedError` for a wrong base."""
    key = name.lower().replace("-", "_")
    return static_mix(key.removeprefix(_PREFIX)).name if key.startswith(_PREFIX) else None


def candidates(plan: ExportPlan, *, allow_iq: bool = False) -> dict[str, list[TensorType]]:
    """The types to choose from, by the name of each tensor of `plan` that may be quantized.

    The head, and the embedding where it is the head, get at least five bits: every prediction passes through them. An
    embedding gets at least what it has in `plan`: data shows the loss on the tokens that are in it, and not on others.
    """
    output = "output.weight" if "output.weight" in plan.layout.shapes else "token_embd.weight"
    kinds = [*_K_TYPES, *(_IQ_TYPES if allow_iq else ())]
    static = {info.name: info.type.bits_per_weight for info in plan.tensors}
    chosen: dict[str, list[TensorType]] = {}
    for name, shape in plan.layout.shapes.items():
        if may_quantize(name, shape):
            fitting = {fitting_type(kind, shape[-1]) for kind in kinds}
            floor = Q5_K.bits_per_weight if name == output else 0
            if name == "token_embd.weight":
                floor = max(floor, static[name])
            allowed = [kind for kind in fitting if kind.bits_per_weight >= floor]
            chosen[name] = sorted(allowed or fitting, key=lambda kind: kind.bits_per_weight)
    return chosen


def dynamic_recipe(
    plan: ExportPlan,
    divergences: Mapping[str, Mapping[str, float]],
    *,
    bits_per_weight: float | None = None,
    max_size: int | str | None = None,
    notes: Mapping[str, object] | None = None,
) -> ExplicitRecipe:
    """The recipe of least expected divergence within the size of `plan`'s own file, made with a static mix.

    `divergences[tensor][type]` is the expected divergence of each candidate; tensors that are not there keep the type
    that they have in `plan`. `bits_per_weight` or `max_size` (bytes, or a text as `5GB`) sets another size.
    ffn_gate and ffn_up of a layer get the same type, because llama.cpp's CUDA kernels fuse only such.

    Raises `ArgumentError` for two sizes at once, `GGUFError` where the size can't be reached.
    """
    if bits_per_weight is not None and max_size is not None:
        raise ArgumentError("bits_per_weight and max_size both set the size", where="dynamic quantization")
    fixed = sum(align(info.num_bytes) for info in plan.tensors if info.name not in divergences)
    budget = data_bytes(plan.tensors) - fixed
    if bits_per_weight is not None:
        budget = int(bits_per_weight * plan.num_weights / 8) - fixed
    if max_size is not None:
        budget = _bytes(max_size) - len(encode_header(plan.metadata, plan.tensors)) - fixed
    shapes = {info.name: info.shape for info in plan.tensors}
    sizes = {
        name: {kind: align(tensor_type(kind).num_bytes(shapes[name])) for kind in costs}
        for name, costs in divergences.items()
    }
    types = allocate_types(divergences, sizes, budget, tied=_gates_and_ups(divergences))
    spent = {
        "bytes": fixed + sum(sizes[name][kind] for name, kind in types.items()),
        "expected_divergence": sum(divergences[name][kind] for name, kind in types.items()),
    }
    order = [info.name for info in plan.tensors if info.name in types]
    return ExplicitRecipe(
        f"{_PREFIX}{plan.quantization}",
        plan.quantization,
        {name: types[name] for name in order},
        spent | dict(notes or {}),
    )


def _gates_and_ups(divergences: Mapping[str, object]) -> list[tuple[str, str]]:
    pairs = ((name, name.replace("ffn_gate", "ffn_up")) for name in divergences if ".ffn_gate" in name)
    return [(gate, up) for gate, up in pairs if up in divergences]


def _bytes(size: int | str) -> int:
    """`5GB`, `4.5 GiB` or a number, in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise UnsupportedError(f"{size!r} is not a size", where="dynamic quantization", fix='max_size="5GB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])
