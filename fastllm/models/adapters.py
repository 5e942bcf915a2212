"""LoRA adapters: which modules get one, PEFT's own classes around them, trainable parameters in fp32."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._errors import ArgumentError, MissingPackageError, UnsupportedError, nearest, reject_unknown
from .._notices import notice, warn
from .embedding_offload import is_offloaded
from .memory import checkpointing_setting, training_bytes
from .mixed_precision import hold_in_fp32
from .model_methods import CHECKPOINTING, PLANNER, TRAINED_IN_FULL, ModelMethods
from .modes import for_training
from .patch import adapt_wrapper, unwrapped
from .vision_layout import Parts, has_vision, target_pattern

# Named as targets, these are trained in full: a low-rank update of an embedding learns new tokens badly.
_VOCABULARY = ("embed_tokens", "lm_head")
# Matrices that hold several projections in some families, as Phi-3.
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class AdapterRequest:
    """The arguments of `get_peft_model`. `options` are further fields of `peft.LoraConfig`."""

    r: int = 16
    target_modules: Sequence[str] | str | None = "all-linear"
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    bias: str = "none"
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: str | None = None
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, Any] | None = None
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    use_dora: bool = False
    finetune_last_n_layers: int | None = None
    use_gradient_checkpointing: bool | str = "fastllm"
    random_state: int = 3407
    options: Mapping[str, Any] = field(default_factory=dict)


def add_adapter(model: Any, request: AdapterRequest, known: Iterable[str]) -> Any:
    """The model under PEFT with the adapter asked for; `known` are the argument names of the public call."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import set_seed

    where = "get_peft_model"
    fields = [f.name for f in dataclasses.fields(LoraConfig)]
    reject_unknown(where, request.options, [*fields, *known])
    if isinstance(model, PeftModel):
        return _same_adapter(model, request)
    if _trains_in_full(model):
        notice("fastllm: the model was loaded with full_finetuning=True, so no adapter is added")
        return model
    setting = checkpointing_setting(request.use_gradient_checkpointing)
    targets, in_full = _targets(model, request)
    _refuse_offloaded(model, in_full)
    set_seed(request.random_state)
    config = LoraConfig(
        r=_rank(request.r),
        target_modules=targets,
        lora_alpha=request.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=request.lora_dropout,
        bias=request.bias,  # pyright: ignore[reportArgumentType]
        layers_to_transform=_layers(model, request),
        layers_pattern=request.layers_pattern,
        use_rslora=request.use_rslora,
        use_dora=request.use_dora,
        modules_to_save=in_full or None,
        init_lora_weights=request.init_lora_weights,  # pyright: ignore[reportArgumentType]
        target_parameters=list(request.target_parameters) if request.target_parameters else None,
        ensure_weight_tying=request.ensure_weight_tying,
        task_type="CAUSAL_LM",
        **_loftq(model, request),
        **request.options,
    )
    adapted = get_peft_model(model, config)
    return _ready(adapted, setting)


def within(model: Any, request: AdapterRequest, parts: Parts) -> AdapterRequest:
    """The request with its targets limited to `parts` of the model. A regular expression is taken as it is."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return request
    targets = request.target_modules
    if targets == "all-linear":
        parts, targets = Parts(), None
    names = [] if targets is None else listed_targets(targets)
    if isinstance(names, str):
        if not parts.is_everything:
            notice("fastllm: target_modules is a regular expression: the finetune_* switches have no effect on it")
        return request
    if names and parts.is_everything:
        return request
    in_full = [name for name in names if name.rsplit(".", 1)[-1] in _VOCABULARY]
    names = _existing(model, [name for name in names if name not in in_full], "target_modules")
    layers = _layers(model, request)
    if layers is not None and parts.vision and has_vision(model):
        raise UnsupportedError(
            "layers_to_transform and finetune_last_n_layers count the decoder's layers, and the vision tower's are "
            "to be trained as well", where="get_peft_model", fix="finetune_vision_layers=False",
        )  # fmt: skip
    if names:
        notice(f"fastllm: of {', '.join(names)}, those in the parts that the finetune_* switches leave on are trained")
    pattern = target_pattern(model, parts, names, [layers] if isinstance(layers, int) else layers)
    saved = [*(request.modules_to_save or []), *in_full]
    return dataclasses.replace(
        request, target_modules=pattern, modules_to_save=saved, layers_to_transform=None, finetune_last_n_layers=None
    )


def load_adapter(model: Any, adapter: str, **hub: Any) -> Any:
    """The model with a saved adapter on it, trainable."""
    from peft import PeftModel

    planner = getattr(model, PLANNER, None)
    adapted = PeftModel.from_pretrained(model, adapter, is_trainable=True, **hub)
    return _ready(adapted, getattr(model, CHECKPOINTING, "fastllm") if planner is None else planner.setting)


def _ready(adapted: Any, setting: bool | str) -> Any:
    """Trainable parameters in fp32, memory planned for them, and a line about what is trained."""
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    base = unwrapped(adapted)
    hold_in_fp32(base, trained)
    planner = getattr(base, PLANNER, None)
    if planner is not None:
        planner.reserved_bytes = training_bytes(base)
    _tell_trained(adapted, trained)
    if isinstance(base, ModelMethods):
        adapt_wrapper(adapted)
    return for_training(adapted, setting)


def _tell_trained(adapted: Any, trained: Mapping[str, nn.Parameter]) -> None:
    kinds: Counter[str] = Counter()
    for name in trained:
        parts = name.split(".")
        if "lora_A" in parts:
            kinds[parts[parts.index("lora_A") - 1]] += 1
        elif "modules_to_save" in parts:
            kinds[f"{parts[parts.index('modules_to_save') - 1]} in full"] += 1
        elif parts[-1] == "bias":
            kinds[f"{parts[-2] if parts[-2] != 'base_layer' else parts[-3]} bias"] += 1
    count = sum(p.numel() for p in trained.values())
    total = sum(_numel(p) for p in adapted.parameters())
    listed = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    notice(f"fastllm trains {count:,} of {total:,} parameters ({100 * count / total:.2f} %): {listed}")


def _numel(parameter: Any) -> int:
    """Values of a parameter, also where 4-bit packing hides two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _trains_in_full(model: Any) -> bool:
    return getattr(model, TRAINED_IN_FULL, False)


def _rank(r: Any) -> int:
    if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
        raise ArgumentError(f"got {r!r}", where="get_peft_model, r", fix="use a positive whole number, e.g. r=16")
    return r


def _targets(model: Any, request: AdapterRequest) -> tuple[list[str] | str, list[str]]:
    """(modules that get LoRA, modules trained in full). Every listed name must occur in the model."""
    targets = listed_targets(request.target_modules or "all-linear")
    in_full = list(request.modules_to_save or [])
    if isinstance(targets, str):
        return targets, _existing(model, in_full, "modules_to_save")
    targets = _existing(model, _merged(model, targets), "target_modules")
    moved = [name for name in targets if name.rsplit(".", 1)[-1] in _VOCABULARY]
    if moved:
        notice(f"fastllm: {', '.join(moved)} in target_modules is trained in full, in fp32, instead of by LoRA")
    in_full += [name for name in moved if name not in in_full]
    return [name for name in targets if name not in moved], _existing(model, in_full, "modules_to_save")


def _refuse_offloaded(model: Any, in_full: Sequence[str]) -> None:
    embedding = unwrapped(model).get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    if is_offloaded(embedding) and any(name == part or name.endswith(f".{part}") for part in in_full):
        raise ArgumentError(
            f"{name} is in host memory, where it is not trained", where="get_peft_model",
            fix="from_pretrained(..., offload_embedding=False)",
        )  # fmt: skip


def _merged(model: nn.Module, targets: list[str]) -> list[str]:
    """Targets with the projections that the model holds as one matrix called by that one's name."""
    held = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for merged, parts in _MERGED.items():
        if merged in held and held.isdisjoint(parts) and set(parts) <= set(targets):
            notice(f"fastllm: {', '.join(parts)} are one matrix in this model; its LoRA goes on {merged}")
            targets = [merged, *(name for name in targets if name not in (*parts, merged))]
    return targets


def listed_targets(targets: Sequence[str] | str) -> list[str] | str:
    """`target_modules` as a list, also where the list is written as a string; other strings as they are."""
    if not isinstance(targets, str):
        return list(targets)
    if not targets.strip().startswith("["):
        return targets
    try:
        names = [str(name) for name in ast.literal_eval(targets.strip())]
    except (ValueError, SyntaxError) as error:
        raise ArgumentError(
            f"{targets!r} looks like a list but can't be read as one", where="target_modules", fix='["q_proj", ...]'
        ) from error
    notice(f"fastllm: target_modules was a list written as a string; read as {names}")
    return names


def _existing(model: nn.Module, names: list[str], where: str) -> list[str]:
    modules = [name for name, _ in model.named_modules() if name]
    last = {name.rsplit(".", 1)[-1] for name in modules}
    missing = [name for name in names if not any(m == name or m.endswith("." + name) for m in modules)]
    if missing:
        hints = "; ".join(f"{name!r} {nearest(name, last)}".rstrip() for name in missing)
        linear = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ArgumentError(
            f"no module of the model is called {hints}",
            where=where,
            fix=f"its linear layers: {', '.join(sorted(linear))}",
        )
    return names


def _layers(model: Any, request: AdapterRequest) -> list[int] | int | None:
    if request.finetune_last_n_layers is None:
        layers = request.layers_to_transform
        return list(layers) if isinstance(layers, Sequence) else layers
    if request.layers_to_transform is not None:
        raise ArgumentError("give one of finetune_last_n_layers and layers_to_transform", where="get_peft_model")
    count = model.config.get_text_config().num_hidden_layers
    wanted = request.finetune_last_n_layers
    if not 1 <= wanted <= count:
        raise ArgumentError(f"got {wanted} of {count} layers", where="finetune_last_n_layers", fix=f"use 1 to {count}")
    return list(range(count - wanted, count))


def _loftq(model: Any, request: AdapterRequest) -> dict[str, Any]:
    """LoftQ's part of the config. An empty or missing `loftq_config` asks for nothing."""
    if request.init_lora_weights != "loftq":
        if request.loftq_config:
            warn("loftq_config is only used with init_lora_weights='loftq' and has no effect here")
        return {}
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise ArgumentError(
            "LoftQ quantizes the base itself and needs it unquantized",
            where="get_peft_model, init_lora_weights='loftq'",
            fix="from_pretrained(..., load_in_4bit=False)",
        )
    if importlib.util.find_spec("scipy") is None:
        raise MissingPackageError("PEFT's LoftQ needs scipy", where="init_lora_weights", fix="pip install scipy")
    return {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1, **(request.loftq_config or {})}}


def _same_adapter(model: Any, request: AdapterRequest) -> Any:
    """A second call with the same settings returns the model as it is; other settings need a new model."""
    config = model.peft_config[model.active_adapter]
    wanted = {
        "r": request.r, "lora_alpha": request.lora_alpha, "lora_dropout": request.lora_dropout, "bias": request.bias,
        "use_rslora": request.use_rslora, "use_dora": request.use_dora,
    }  # fmt: skip
    different = {
        name: (getattr(config, name), value) for name, value in wanted.items() if getattr(config, name) != value
    }
    if different:
        listed = ", ".join(f"{name} is {has!r}, asked for {value!r}" for name, (has, value) in different.items())
        raise ArgumentError(
            f"the model has an adapter already: {listed}", where="get_peft_model", fix="load the model again"
        )
    notice("fastllm: the model already has this adapter")
    return for_training(model, checkpointing_setting(request.use_gradient_checkpointing))
