"""A loaded model under PEFT seen as a plain one: where each weight of the base is, and what training changed in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._errors import ModelError, UnsupportedError
from ..kernels.nf4 import Nf4Weight, dequantize_nf4
from .embedding_offload import device_of
from .lora_view import projection_of
from .weight_edits import Edit, LowRank, Part, Replace, Rows, Shift, WeightDecomposed


@dataclass(frozen=True)
class LoadedTensor:
    """A parameter or buffer of the base, by the module that owns it."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def raw(self) -> torch.Tensor:
        """The tensor as it is held, packed where it is quantized."""
        return getattr(self.module, self.attribute)

    @property
    def is_quantized(self) -> bool:
        return getattr(self.raw, "quant_state", None) is not None or self.raw.dtype == torch.int8

    def value(self, part: Part) -> torch.Tensor:
        """The numbers that a part of it stands for, on the CPU; fp32 where they are dequantised."""
        if self.raw.is_meta:
            raise ModelError(
                "its weights are offloaded and not in memory", where=self.name, fix="load it on one device to save it"
            )
        if not self.is_quantized:
            return part.of(self.raw.detach()).cpu()
        if self.raw.dtype == torch.int8:
            return part.of(_dequantized_int8(self.module)).cpu()
        projection = projection_of(self.module)
        if isinstance(projection, str) or not isinstance(projection.weight, Nf4Weight):
            raise ModelError(f"it can't be dequantised: {projection}", where=self.name)
        return part.of(dequantize_nf4(projection.weight, torch.float32)).cpu()


def _dequantized_int8(module: Any) -> torch.Tensor:
    """LLM.int8: each row is scaled by its largest value over 127 (Dettmers et al., arXiv 2208.07339, section 2)."""
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.detach().float() * (scale.float()[:, None] / 127)


@dataclass
class AdaptedWeights:
    """`loaded` and `edits` by the name that a weight has in the model without PEFT.

    `active` are the adapters that are merged, `idle` those that are not; `in_place` layers hold merged weights already,
    `switched_off` layers ignore their adapters at present.
    """

    loaded: dict[str, LoadedTensor] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    active: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    switched_off: list[str] = field(default_factory=list)


def read_adapters(model: nn.Module) -> AdaptedWeights:
    """Walk a transformers model, with or without PEFT's layers in it.

    Raises `UnsupportedError` for an adapter that is not a linear change of the weights it sits on.
    """
    weights = AdaptedWeights()
    configs = getattr(model, "peft_config", {})
    _visit(weights, model, "", {name: config.bias for name, config in configs.items() if hasattr(config, "bias")})
    weights.idle = [name for name in configs if name not in weights.active]
    return weights


def _visit(weights: AdaptedWeights, module: nn.Module, name: str, biases: dict[str, str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, AuxiliaryTrainingWrapper):
        _visit(weights, module.original_module, name, biases)
        _read_wrapper(weights, module, name)
    elif isinstance(module, BaseTunerLayer):
        _visit(weights, module.get_submodule("base_layer"), name, biases)
        _read_layer(weights, module, name, biases)
    else:
        _read_plain(weights, module, name, biases)
        for child_name, child in module.named_children():
            _visit(weights, child, f"{name}.{child_name}" if name else child_name, biases)


def _read_plain(weights: AdaptedWeights, module: nn.Module, name: str, biases: dict[str, str]) -> None:
    """A module of the base: its tensors, and those of them that are trained directly."""
    state = {**module._parameters, **{k: b for k, b in module._buffers.items() if k in _persistent(module)}}
    for attribute, tensor in state.items():
        if tensor is None:
            continue
        full_name = f"{name}.{attribute}" if name else attribute
        weights.loaded[full_name] = LoadedTensor(module, attribute, full_name)
        trained_bias = attribute == "bias" and "all" in biases.values()
        if tensor.is_floating_point() and (tensor.requires_grad or trained_bias):
            _replace(weights, full_name, tensor)


def _persistent(module: nn.Module) -> set[str]:
    return set(module._buffers) - module._non_persistent_buffers_set


def _replace(weights: AdaptedWeights, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_meta:
        raise ModelError("it was trained, but is offloaded and not in memory", where=name)
    weights.edits[name].append(Replace(tensor, weights.loaded[name].raw.dtype))


def _note_active(weights: AdaptedWeights, module: Any, name: str, held: Any) -> list[str]:
    """The adapters of this layer that are to be merged, in order."""
    active = [adapter for adapter in module.active_adapters if adapter in held]
    if active and module.disable_adapters:
        weights.switched_off.append(name)
    weights.active += [adapter for adapter in active if adapter not in weights.active]
    return active


def _read_wrapper(weights: AdaptedWeights, module: Any, name: str) -> None:
    """A module trained in full (`modules_to_save`), or rows of an embedding (`trainable_token_indices`)."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        for adapter in _note_active(weights, module, name, module.modules_to_save):
            for attribute, tensor in module.modules_to_save[adapter].state_dict(keep_vars=True).items():
                _replace(weights, f"{name}.{attribute}", tensor)
    elif isinstance(module, TrainableTokensWrapper):
        layer: Any = module.token_adapter
        if layer.merged:
            weights.in_place.append(name)
        for adapter in _note_active(weights, module, name, layer.trainable_tokens_delta):
            indices = torch.tensor(layer.token_indices[adapter])
            weights.edits[f"{name}.weight"].append(Rows(indices, layer.trainable_tokens_delta[adapter]))
    else:
        raise UnsupportedError(f"a {type(module).__name__} can't be merged", where=name)


def _read_layer(weights: AdaptedWeights, layer: Any, name: str, biases: dict[str, str]) -> None:
    """A layer of PEFT's LoRA."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(layer, LoraLayer):
        raise UnsupportedError(
            f"its adapter is a {type(layer).__module__}.{type(layer).__name__}, not LoRA",
            where=name,
            fix="merge it with PEFT: model.merge_and_unload().save_pretrained(folder)",
        )
    if layer.merged:
        weights.in_place.append(name)
    held = [*layer.lora_A, *layer.lora_embedding_A]
    for adapter in _note_active(weights, layer, name, held):
        target = f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else f"{name}.weight"
        weights.edits[target].append(_weight_edit(layer, adapter, name))
        bias = f"{name}.bias"
        if biases.get(adapter) == "lora_only" and bias in weights.loaded and not weights.edits.get(bias):
            _replace(weights, bias, weights.loaded[bias].raw)
        if layer.lora_bias.get(adapter):
            own_bias: Any = layer.lora_B[adapter].bias
            weights.edits[bias].append(Shift(own_bias, layer.scaling[adapter]))


def _weight_edit(layer: Any, adapter: str, name: str) -> Edit:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.lora.variants import DoraLinearVariant

    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if isinstance(layer, ParamWrapper):
        return _stacked(layer, adapter)
    scale = float(layer.scaling[adapter])
    transposed = bool(getattr(layer, "fan_in_fan_out", False))
    if adapter in layer.lora_embedding_A:
        left, right = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    else:
        left, right = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
        if left.dim() != 2:
            raise UnsupportedError("LoRA on a convolution can't be merged", where=name)
        if transposed:
            left, right = right.T, left.T
    low_rank = LowRank(left, right, scale)
    if variant is None:
        return low_rank
    if type(variant) is not DoraLinearVariant or transposed:
        raise UnsupportedError(
            f"the LoRA variant {type(variant).__name__} of a {type(layer).__name__} can't be merged file to file",
            where=name,
            fix="merge it with PEFT: model.merge_and_unload().save_pretrained(folder)",
        )
    return WeightDecomposed(low_rank, layer.lora_magnitude_vector[adapter].weight)


def _stacked(layer: Any, adapter: str) -> LowRank:
    """LoRA on a parameter [experts, rows, columns] or [rows, columns]: PEFT keeps the experts' ranks side by side."""
    parameter, experts = layer.get_param(), layer.num_experts
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    scale = float(layer.scaling[adapter])
    if parameter.dim() == 2:
        return LowRank(b, a, scale)
    a = a.reshape(experts, -1, a.shape[-1])  # [experts, r, in]
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # [experts, out, r]
    if layer._did_swap_in_out_features:  # the parameter is [experts, out, in]
        return LowRank(b, a, scale)
    return LowRank(a.transpose(1, 2), b.transpose(1, 2), scale)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as its base does. PEFT's own switch would also change what is trained."""
    changed: list[Any] = [m for m in model.modules() if getattr(m, "_disable_adapters", None) is False]
    for module in changed:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in changed:
            module._disable_adapters = False


def training_precision(model: nn.Module) -> torch.autocast:
    """Autocast to the model's 16-bit dtype, as in training; none for one that has no 16-bit weights.

    Modules that are trained in full are held in fp32, which the 16-bit layers behind them do not take as it is.
    """
    halves = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    return torch.autocast(
        device_of(model).type, dtype=min(halves, key=str, default=torch.bfloat16), enabled=bool(halves)
    )
