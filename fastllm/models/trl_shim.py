"""The one thing fastllm changes in another library, and says so: old keyword names given to TRL's trainers and configs.

Notebooks written for older releases pass `tokenizer=`, `max_seq_length=`, `dataset_text_field=` and more where present
TRL has other names or places for them. The shim wraps `__init__` of TRL's trainer and config classes, in place, so that
any import order works and `isinstance` holds: old names are translated and reported, everything else passes unchanged.
`uninstall_trl_shim` puts the original `__init__`s back.

For a model of fastllm the wrapped trainer constructor also checks the data before minutes are spent, keeps the adapters
in the dtype `get_peft_model` gave them, and binds fastllm's fused head in TRL's place (see `fused_head`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .._device import default_device
from .._errors import ArgumentError, nearest
from .._notices import notice
from . import trl_training

_KINDS = ("sft", "dpo", "kto", "reward", "grpo", "rloo")
_NAMES = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
# Old config name -> present one.
_RENAMED = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "warmup_ratio": "warmup_steps",
}
# Old config name -> why nothing is lost by leaving it out.
_DROPPED = {
    "overwrite_output_dir": "checkpoints go to output_dir without asking",
    "save_safetensors": "safetensors is the only format",
    "logging_dir": "each logger has its own setting for that",
    "use_ipex": "torch needs no extension for it",
    "jit_mode_eval": "evaluation is not traced",
    "include_tokens_per_second": "num_tokens is logged",
    "max_prompt_length": "prompt and answer together are cut to max_length",
}
_installed: dict[type, Callable[..., None]] = {}


def install_trl_shim() -> None:
    """Wrap the constructors of TRL's trainers and configs, once. Does nothing where TRL is not installed."""
    if _installed or importlib.util.find_spec("trl") is None:
        return
    for kind in _KINDS:
        config = _trl_class(f"trl.trainer.{kind}_config", f"{_NAMES[kind]}Config")
        trainer = _trl_class(f"trl.trainer.{kind}_trainer", f"{_NAMES[kind]}Trainer")
        if config is None or trainer is None:
            continue
        _wrap(config, _config_init)
        _wrap(trainer, functools.partial(_trainer_init, config))


def uninstall_trl_shim() -> None:
    """Give TRL's classes their own constructors back."""
    for cls, original in _installed.items():
        cls.__init__ = original  # pyright: ignore[reportAttributeAccessIssue]
    _installed.clear()


def _trl_class(module: str, name: str) -> type | None:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):  # a trainer that this release of TRL does not have, or can't import
        return None


def _wrap(cls: type, replacement: Callable[..., None]) -> None:
    original = cls.__init__
    _installed[cls] = original

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        replacement(original, self, *args, **kwargs)

    cls.__init__ = __init__  # pyright: ignore[reportAttributeAccessIssue]


def _config_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """A config's constructor with old names translated and the precision chosen by the machine."""
    translated = translate_config(type(self), kwargs)
    fields = {f.name for f in dataclasses.fields(type(self))}
    if not {"bf16", "fp16"} & set(translated) and not args and {"bf16", "fp16"} <= fields:
        translated |= _machine_precision()
    original(self, *args, **translated)
    self._fastllm_given = frozenset(kwargs)


def _trainer_init(config: type, original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """A trainer's constructor with old names translated or moved to its config."""
    names = list(inspect.signature(original).parameters)[1:]
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if "tokenizer" in kwargs and "tokenizer" not in names:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        notice("fastllm: tokenizer= is called processing_class= in present TRL", once="trl:tokenizer")
    moved = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
    if moved:
        kwargs["args"] = _with_moved(config, kwargs.get("args"), moved)
    trl_training.construct(config, original, self, kwargs)


def translate_config(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with old names replaced by those of `config`. Raises `ArgumentError` for what it has no place for."""
    fields = [f.name for f in dataclasses.fields(config)]
    result: dict[str, Any] = {}
    for name, value in given.items():
        if name in fields:
            result[name] = value
        elif name in _RENAMED and _RENAMED[name] in fields:
            present = _RENAMED[name]
            if present in given:
                raise ArgumentError(f"{name} and {present} mean the same", where=config.__name__, fix=f"keep {present}")
            if name == "warmup_ratio" and not value:
                continue
            result[present] = value
            notice(f"fastllm: {name}= is called {present}= in present TRL", once=f"trl:{name}")
        elif name == "group_by_length" and "train_sampling_strategy" in fields:
            if value:
                result["train_sampling_strategy"] = "group_by_length"
                notice('fastllm: group_by_length=True is train_sampling_strategy="group_by_length"', once=f"trl:{name}")
        elif name in _DROPPED:
            notice(f"fastllm: {name}={value!r} has no effect any more: {_DROPPED[name]}", once=f"trl:{name}")
        else:
            hint = nearest(name, [*fields, *_RENAMED, *_DROPPED])
            raise ArgumentError(f"unknown argument {name!r} {hint}".rstrip(), where=config.__name__)
    return result


def _with_moved(config: type, args: Any, moved: Mapping[str, Any]) -> Any:
    """The trainer's config with settings that were given to the trainer itself."""
    settings = translate_config(config, moved)
    notice(f"fastllm: {', '.join(moved)} given to the trainer belong to {config.__name__}", once=f"trl:{sorted(moved)}")
    if args is None:
        return config(**settings)
    if not isinstance(args, config):  # plain TrainingArguments, as older scripts pass
        present = {**args.to_dict(), "hub_token": args.hub_token}
        known = {f.name for f in dataclasses.fields(config)}
        return config(**{**{k: v for k, v in present.items() if k in known}, **settings})
    for name, value in settings.items():
        setattr(args, name, value)
    args._fastllm_given = getattr(args, "_fastllm_given", frozenset()) | set(settings)
    return args


def _machine_precision() -> dict[str, bool]:
    """bf16 where it is native, fp16 on older GPUs, neither on a CPU (TRL's own default is bf16 everywhere)."""
    device = default_device()
    if device.kind == "cpu":
        return {"bf16": False, "fp16": False}
    if device.has_bf16:
        return {"bf16": True, "fp16": False}
    notice(f"fastllm: fp16 training, since {device.name} has no native bf16", once="trl:fp16")
    return {"bf16": False, "fp16": True}
