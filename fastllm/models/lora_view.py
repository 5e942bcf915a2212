"""A linear layer, plain or 4-bit, alone or under a PEFT adapter, seen as the tensors that the kernels take.

Works by duck typing, so PEFT is not imported. What the kernels can't express is answered with the
reason, and the caller leaves that layer to its own forward.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .._compat import ADAPTER_SWITCHES, adapter_switches, has_foreign_hooks
from ..kernels.nf4 import Nf4Weight
from ..kernels.projections import Projection, ProjectionGroup, fp8_obstacle
from .quantized import unpack_cpu_weight
from .watch import Watch

# Attribute of a module that remembers what was made of it and its parts, with the state that it was made from.
CACHE = "_fastllm_groups"
# Attribute of an owning module whose frozen weights shall be multiplied in FP8.
FP8_COMPUTE = "_fastllm_fp8_compute"
# Attribute of a model the gradient of whose hidden states shall come through its head in FP8.
FP8_GRADIENT = "_fastllm_fp8_gradient"


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


def group_of(
    owner: nn.Module, key: str, modules: Sequence[nn.Module], watch: Watch | None = None
) -> ProjectionGroup | str:
    """The layers `modules` as one group, or why they can't be fused; remembered on `owner` while nothing changes, and
    `watch` learns what that depends on."""
    cache: dict[str, _Made] = owner.__dict__.setdefault(CACHE, {})
    known = cache.get(key)
    if known is None or not (all(map(operator.is_, known.modules, modules)) and known.watch.holds()):
        known = cache[key] = _made_of(owner, modules)
    if watch is not None:
        watch.include(known.watch)
    return known.group


class _Made(NamedTuple):
    """What was made of a few layers, or why nothing could be, and what that depends on."""

    group: ProjectionGroup | str
    modules: tuple[nn.Module, ...]
    watch: Watch


def _made_of(owner: nn.Module, modules: Sequence[nn.Module]) -> _Made:
    watch, projections = Watch(), []
    watch.entries(owner._modules, *(name for name, module in owner._modules.items() if module in modules))
    for module in modules:
        projections.append(projection_of(module))
        _watch_projection(watch, module)
    result = next((projection for projection in projections if isinstance(projection, str)), None)
    if result is None:
        is_fp8 = owner.__dict__.get(FP8_COMPUTE, False) and fp8_obstacle(projections) is None
        result = ProjectionGroup(projections, is_fp8=is_fp8)
    return _Made(result, tuple(modules), watch)


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


def _watch_projection(watch: Watch, module: nn.Module) -> None:
    """Everything that `projection_of` reads, but what stays for the lifetime of a module."""
    modules = module._modules
    watch.entries(modules, "base_layer")
    base = modules.get("base_layer") or module
    watch_hooks(watch, module)
    weight: Any = base._parameters.get("weight")
    watch.tensors(base, "weight", "bias")
    if weight is not None:
        watch.entries(weight.__dict__, "quant_state")
        quantization = getattr(weight, "quant_state", None)
        if quantization is not None:
            watch.entries(quantization.__dict__, "absmax")  # QuantState.to exchanges its tensors in place
    if base is module:
        return
    watch_hooks(watch, base)
    watch_adapter_switches(watch, module)
    adapters_a, adapters_b, dropouts = (modules.get(name) for name in ("lora_A", "lora_B", "lora_dropout"))
    if adapters_a is None or adapters_b is None or dropouts is None:
        return
    active, _ = adapter_switches(module)
    watch.entries(module.__dict__, "scaling")
    for name in active:
        if name in adapters_a._modules:
            for parts in (adapters_a, adapters_b, dropouts):
                watch.entries(parts._modules, name)
            for part in (adapters_a._modules[name], adapters_b._modules[name]):
                watch.tensors(part, "weight")
            watch.entries(module.__dict__["scaling"], name)
            if isinstance(dropouts._modules[name], nn.Dropout):
                watch.entries(module.__dict__, "training")


def watch_adapter_switches(watch: Watch, module: Any) -> None:
    """What `adapter_switches` reads."""
    attributes = module.__dict__
    if all(name in attributes for name in ADAPTER_SWITCHES):
        watch.entries(attributes, *ADAPTER_SWITCHES)
        watch.contents(*(attributes[name] for name in ADAPTER_SWITCHES if isinstance(attributes[name], list)))
    else:
        watch.answer(adapter_switches, module)


def watch_hooks(watch: Watch, module: nn.Module) -> None:
    """What `has_foreign_hooks` reads."""
    watch.entries(module.__dict__, "forward")
    watch.contents(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
