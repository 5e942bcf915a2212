"""A linear layer, plain or 4-bit, alone or under a PEFT adapter, seen as the tensors that the kernels take.

Works by duck typing, so PEFT is not imported. What the kernels can't express is answered with the
reason, and the caller leaves that layer to its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .._compat import adapter_switches, has_foreign_hooks
from ..kernels.nf4 import Nf4Weight
from ..kernels.projections import Projection, ProjectionGroup, fp8_obstacle
from .quantized import unpack_cpu_weight

# Attribute of a module that remembers what was made of it and its parts, with the state that it was made from.
CACHE = "_fastllm_groups"
_PLAIN = (bool, int, float, str, tuple)
# Attribute of an owning module whose frozen weights shall be multiplied in FP8.
FP8_COMPUTE = "_fastllm_fp8_compute"


def projection_of(module: nn.Module) -> Projection | str:
    """The layer's tensors, or why the fused kernels can't take it."""
    if has_foreign_hooks(module):
        return "a forward hook is registered on it"
    base = getattr(module, "base_layer", None)
    if base is None:
        return _base_projection(module)
    if has_foreign_hooks(base):
        return "a forward hook is registered on it"
    plain = _base_projection(base)
    if isinstance(plain, str):
        return plain
    lora: Any = module
    if getattr(lora, "lora_A", None) is None:
        return f"its adapter is a {type(module).__name__}, not LoRA"
    active = [name for name in lora.active_adapters if name in lora.lora_A]
    if lora.disable_adapters or lora.merged or not active:
        return plain
    if len(active) > 1:
        return f"{len(active)} adapters are active at once"
    (name,) = active
    if name in getattr(lora, "lora_variant", {}):
        return f"its adapter is the LoRA variant {type(lora.lora_variant[name]).__name__}"
    if getattr(lora, "fan_in_fan_out", False):
        return "its weight is stored transposed"
    a, b, dropout = lora.lora_A[name], lora.lora_B[name], lora.lora_dropout[name]
    if b.bias is not None:
        return "its adapter has a bias of its own (lora_bias)"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its adapter's dropout is a {type(dropout).__name__}"
    probability = dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0
    return Projection(plain.weight, plain.bias, a.weight, b.weight, float(lora.scaling[name]), probability)


def group_of(owner: nn.Module, key: str, modules: Sequence[nn.Module]) -> ProjectionGroup | str:
    """The layers `modules` as one group, or why they can't be fused; remembered on `owner` while nothing changes."""
    state = [_state_of(module) for module in modules]
    cache: dict[str, tuple[list[tuple], ProjectionGroup | str]] = owner.__dict__.setdefault(CACHE, {})
    known = cache.get(key)
    if known is not None and _same(known[0], state):
        return known[1]
    projections = []
    result: ProjectionGroup | str | None = None
    for module in modules:
        projection = projection_of(module)
        if isinstance(projection, str):
            result = projection
            break
        projections.append(projection)
    if result is None:
        is_fp8 = owner.__dict__.get(FP8_COMPUTE, False) and fp8_obstacle(projections) is None
        result = ProjectionGroup(projections, is_fp8=is_fp8)
    cache[key] = (state, result)
    return result


def forget_groups(model: nn.Module) -> None:
    """Drop everything that modules remember of themselves."""
    for module in model.modules():
        module.__dict__.pop(CACHE, None)


def _base_projection(module: nn.Module) -> Projection | str:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return f"it is a {type(module).__name__}, not a linear layer"
    bias = module.bias
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        unpack_cpu_weight(module)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return Projection(nf4_weight(module.weight, state, getattr(module, "compute_dtype", None)), bias)
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} ({type(module).__name__})"
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}"
    return Projection(weight, bias)


def nf4_weight(packed: torch.Tensor, state: Any, compute_dtype: torch.dtype | None = None) -> Nf4Weight:
    """A packed weight and bitsandbytes' quantisation state of it as plain tensors."""
    nested = state.state2 if state.nested else None
    return Nf4Weight(
        packed=packed.detach().view(torch.uint8).reshape(-1),
        absmax=state.absmax,
        code=state.code,
        shape=(state.shape[0], state.shape[1]),
        blocksize=state.blocksize,
        nested_absmax=None if nested is None else nested.absmax,
        nested_code=None if nested is None else nested.code,
        offset=state.offset if nested is not None else None,
        nested_blocksize=256 if nested is None else nested.blocksize,
        compute_dtype=compute_dtype,
    )


def _state_of(module: nn.Module) -> tuple:
    """What a projection was made from: compared by identity to see whether it still holds.

    Every layer of every forward asks for it, so it reads the dictionaries that modules keep their parts in.
    """
    modules = module._modules
    base = modules.get("base_layer") or module
    weight = base._parameters.get("weight")
    quantization = getattr(weight, "quant_state", None)
    state = (
        weight,
        None if weight is None else weight.data_ptr(),
        quantization,
        getattr(quantization, "absmax", None),  # QuantState.to exchanges its tensors in place
        base._parameters.get("bias"),
        bool(
            module._forward_hooks or base._forward_hooks or "forward" in module.__dict__ or "forward" in base.__dict__
        ),
        module.training,
        weight is not None and weight.requires_grad,
    )
    if base is module:
        return state
    active, switches = adapter_switches(module)
    parts: list = [active, switches]
    adapters_a, adapters_b, dropouts = (modules.get(name) for name in ("lora_A", "lora_B", "lora_dropout"))
    if adapters_a is not None and adapters_b is not None and dropouts is not None:
        scaling: Any = module.__dict__["scaling"]
        for name in active:
            if name in adapters_a._modules:
                a, b = adapters_a._modules[name], adapters_b._modules[name]
                assert a is not None and b is not None
                parts += (a._parameters["weight"], b._parameters["weight"], scaling[name], dropouts._modules[name])
    return (*state, *parts)


def _same(left: list[tuple], right: list[tuple]) -> bool:
    """Equality of states: tensors and objects by identity, plain values by value."""
    for a, b in zip(left, right, strict=True):
        if len(a) != len(b):
            return False
        for x, y in zip(a, b, strict=True):
            if x is not y and not (isinstance(x, _PLAIN) and x == y):
                return False
    return True
