"""From a name to a model that is ready for adapters: resolve, plan the precision, load, adapt, settle the tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .._compat import use_expandable_segments
from .._device import Device, default_device
from .._errors import ArgumentError, ModelError, UnsupportedError
from .._notices import notice, warn
from ..text.rendering import tokenizer_of
from .arch import arch_of, described, supported_model_types
from .embedding_offload import offload_embedding
from .fp8_compute import check_fp8_compute, use_fp8
from .memory import checkpointing_setting, training_bytes
from .mixed_precision import widens
from .model_methods import MERGES_MICRO_BATCHES, PLANNER, TOKENIZER, TRAINED_IN_FULL
from .modes import checkpoint_blocks
from .patch import adapt, decoder_layers
from .processor import load_processor
from .quantized import bitsandbytes_config, given_config, in_one_dtype
from .tokenizer import load_tokenizer, settle_tokens
from .vision_layout import spared_by_quantization

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class DefaultLength(int):
    """A context length that nobody asked for: it gives way to a checkpoint whose own is shorter."""


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of `from_pretrained`, checked for contradictions. `hub` holds what goes to each hub download."""

    model_name: str
    max_seq_length: int | None = None
    dtype: torch.dtype | None = None
    bits: int = 4
    full_finetuning: bool = False
    float32_weights: bool = False
    quantization_config: Any = None
    device_map: Any = "sequential"
    rope_scaling: Mapping[str, Any] | None = None
    fix_tokenizer: bool = True
    trust_remote_code: bool = False
    use_gradient_checkpointing: bool | str = "fastllm"
    resize_model_vocab: int | None = None
    text_only: bool = False
    tokenizer_name: str | None = None
    attn_implementation: str | None = None
    config: Any = None
    patch: bool = True
    strict: bool = False
    merge_micro_batches: bool = True
    offload_embedding: bool = False
    fp8_compute: bool = False
    cuda_graphs: bool = True
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """What a name stands for: a base checkpoint, and an adapter folder or repository on top of it."""

    base: str
    config: Any
    adapter: str | None = None

    @property
    def has_vision(self) -> bool:
        return getattr(self.config, "vision_config", None) is not None


@dataclass(frozen=True)
class Precision:
    """`dtype` of the 16-bit parts and of the arithmetic; `quantization` for transformers; `label` for the banner."""

    dtype: torch.dtype
    quantization: Any
    label: str


def load(request: LoadRequest) -> tuple[Any, Any]:
    """(model, tokenizer or processor): the model adapted to the fast classes where its architecture has them."""
    started = time.perf_counter()
    device = default_device()
    if device.kind == "cuda" and use_expandable_segments():
        notice("fastllm: CUDA memory grows in expandable segments (PYTORCH_CUDA_ALLOC_CONF overrides)", once="segments")
    source = resolve(request)
    precision = plan_precision(request, source.config, device)
    fp8_compute = check_fp8_compute(
        request.fp8_compute, source.config.model_type, device, precision.dtype,
        bits=request.bits, full_finetuning=request.full_finetuning, patch=request.patch,
    )  # fmt: skip
    max_seq_length = extend_context(source.config, request)
    model = _load_weights(request, source, precision, device)
    if request.resize_model_vocab is not None:
        model.resize_token_embeddings(request.resize_model_vocab)
    _adapt(model, request, fp8_compute=fp8_compute)
    tokenizer = _load_tokenizer(request, source, max_seq_length)
    settle_tokens(tokenizer_of(tokenizer), model, repair=request.fix_tokenizer)
    setattr(model, TOKENIZER, tokenizer)
    setattr(model, MERGES_MICRO_BATCHES, request.merge_micro_batches)
    model.max_seq_length = max_seq_length
    if request.full_finetuning:
        _train_everything(model)
    if request.offload_embedding:
        offload_embedding(model)
    if source.adapter is not None:
        model = _attach_adapter(model, source.adapter, request)
    notice(_banner(source, precision, device, max_seq_length, time.perf_counter() - started))
    return model, tokenizer


def resolve(request: LoadRequest) -> Source:
    """Read the adapter's config, if the name is an adapter, and the base checkpoint's."""
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    name, adapter, config = request.model_name, None, request.config
    try:
        if find_adapter_config_file(name, **_of(request.hub, "token", "revision", "cache_dir", "local_files_only")):
            adapter, name = name, _adapter_base(name, request.hub)
        if config is None:
            config = AutoConfig.from_pretrained(name, trust_remote_code=request.trust_remote_code, **request.hub)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        is_path = name.startswith((".", "~", os.sep)) and not os.path.exists(name)
        cause = str(error).splitlines()[0]
        raise ModelError(
            "there is no such folder" if is_path else f"no model config could be read ({cause})",
            where=name,
            fix="give a folder that holds config.json, or a repository name; for a private one also token=...",
        ) from error
    source = Source(name, config, adapter)
    if source.has_vision and request.text_only:
        raise UnsupportedError(
            f"{config.model_type!r} can't be loaded without its vision tower in this version",
            where=name,
            fix="leave text_only out: get_peft_model(finetune_vision_layers=False) trains the language layers alone",
        )
    return source


def _adapter_base(adapter: str, hub: Mapping[str, Any]) -> str:
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter, **hub).base_model_name_or_path
    if not base:
        raise ModelError("its adapter_config.json names no base model", where=adapter, fix="load the base model itself")
    return base


def plan_precision(request: LoadRequest, config: Any, device: Device) -> Precision:
    """Which dtype and quantization the request means on this machine and for this checkpoint."""
    dtype = request.dtype or _machine_dtype(device)
    if dtype is torch.bfloat16 and not device.has_bf16:
        warn(f"{device.name} has no native bf16: fp16 is used instead")
        dtype = torch.float16
    if request.full_finetuning and request.float32_weights:
        dtype = torch.float32
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        return _existing_quantization(request, existing, dtype)
    name = str(dtype).removeprefix("torch.")
    if request.quantization_config is not None:
        return Precision(dtype, given_config(request.quantization_config), f"given quantization, {name}")
    if request.full_finetuning:
        return Precision(dtype, None, f"full fine-tuning in {name}")
    if request.bits == 16:
        return Precision(dtype, None, name)
    label = f"NF4 with double quantization, {name}" if request.bits == 4 else f"int8, {name}"
    return Precision(dtype, bitsandbytes_config(request.bits, dtype), label)


def extend_context(config: Any, request: LoadRequest) -> int:
    """The context length asked for; rotary angles are scaled where it passes the checkpoint's own. Returns it."""
    text = config.get_text_config()
    native = getattr(text, "max_position_embeddings", None)
    wanted = request.max_seq_length or native or 2048
    if native is not None and isinstance(wanted, DefaultLength):
        wanted = min(wanted, native)
    if request.rope_scaling is not None:
        scaling = dict(request.rope_scaling)
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "linear"))
        text.rope_parameters = {**(getattr(text, "rope_parameters", None) or {}), **scaling}
        notice(f"fastllm: RoPE scaling as given: {scaling}")
    if native is None or wanted <= native:
        return wanted
    if not hasattr(text, "rope_parameters"):
        raise ModelError(
            f"its positions end at {native:,} and can't be scaled",
            where=request.model_name,
            fix=f"max_seq_length={native}",
        )
    parameters = dict(text.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if request.rope_scaling is None and kind == "default":
        factor = wanted / native
        text.rope_parameters = {**parameters, "rope_type": "linear", "factor": factor}
        notice(f"fastllm: {wanted:,} tokens are past the native {native:,}: RoPE positions are divided by {factor:g}")
    else:
        notice(f"fastllm: {wanted:,} tokens are past the native {native:,}: its own RoPE scaling ({kind}) is extended")
    text.max_position_embeddings = wanted
    return wanted


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """A torch dtype from a torch dtype or its name; None stays None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES:
        return _DTYPES[dtype.removeprefix("torch.")]
    if dtype == "auto":
        return None
    raise ArgumentError(f"got {dtype!r}", where="dtype", fix=f"use None, a torch dtype, or one of {', '.join(_DTYPES)}")


def _machine_dtype(device: Device) -> torch.dtype:
    if device.kind == "cpu":
        return torch.float32
    return torch.bfloat16 if device.has_bf16 else torch.float16


def _existing_quantization(request: LoadRequest, existing: Any, dtype: torch.dtype) -> Precision:
    """A checkpoint that is quantized already keeps its format; only the arithmetic's dtype is ours to choose."""
    fields = existing if isinstance(existing, dict) else existing.to_dict()
    method = str(fields.get("quant_method", "unknown")).removeprefix("QuantizationMethod.").lower()
    if request.full_finetuning:
        raise ModelError(
            f"its weights are quantized ({method}) and can't be trained in full",
            where=request.model_name,
            fix="load the 16-bit checkpoint it was made from",
        )
    if isinstance(existing, dict) and "bnb_4bit_compute_dtype" in existing:
        existing["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    notice(f"fastllm: the checkpoint is already quantized ({method}) and is loaded as it is")
    return Precision(dtype, None, f"{method} as stored, {str(dtype).removeprefix('torch.')}")


def _load_weights(request: LoadRequest, source: Source, precision: Precision, device: Device) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto_class: Any = AutoModelForImageTextToText if source.has_vision else AutoModelForCausalLM
    options: dict[str, Any] = {}
    if precision.quantization is not None:
        options["quantization_config"] = precision.quantization
        if source.has_vision and request.quantization_config is None:
            skipped = spared_by_quantization(auto_class, source.config, request.trust_remote_code)
            precision.quantization.llm_int8_skip_modules = skipped
    attention = _attn_implementation(request, source.config)
    if attention is not None:
        options["attn_implementation"] = attention
    is_stored_quantized = getattr(source.config, "quantization_config", None) is not None
    model = auto_class.from_pretrained(
        source.base, config=source.config, dtype=precision.dtype, device_map=_device_map(request.device_map, device),
        trust_remote_code=request.trust_remote_code, **options, **request.hub,
    )  # fmt: skip
    if is_stored_quantized:
        in_one_dtype(model, precision.dtype)
    return model


def _attn_implementation(request: LoadRequest, config: Any) -> str | None:
    """transformers' own attention, for what the fast layers leave to it. Its SDPA has no cap for the scores: before
    transformers 5.2x Gemma 2 ran without its cap there, and was its default; since then it is refused."""
    wanted, arch = request.attn_implementation, arch_of(config)
    has_caps = arch is not None and any(getattr(fast, "caps_scores", False) for fast in arch.classes.values())
    if wanted not in (None, "sdpa") or not has_caps or not config.get_text_config().attn_logit_softcapping:
        return wanted
    if wanted is not None:
        notice("fastllm: attn_implementation='eager' is used: 'sdpa' would leave out the cap of this model's scores")
    return "eager"


def _device_map(device_map: Any, device: Device) -> Any:
    """One device where one will do: several GPUs without a launcher keep transformers' own placement."""
    under_launcher = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    several = torch.cuda.is_available() and torch.cuda.device_count() > 1 and not under_launcher
    if isinstance(device_map, str) and device_map in ("sequential", "auto", "balanced", "unsloth") and not several:
        return {"": device.torch_name}
    return "sequential" if device_map == "unsloth" else device_map


def _adapt(model: Any, request: LoadRequest, *, fp8_compute: bool) -> None:
    arch = arch_of(model.config) if request.patch else None
    if arch is None and request.patch:
        text = f"{described(model.config)!r} has no fast classes yet; supported: {', '.join(supported_model_types())}"
        if request.strict:
            raise ModelError(
                text, where=request.model_name, fix="leave strict=True out to train it with transformers' own code"
            )
        notice(f"fastllm: {text}. The model runs transformers' own forward.")
    setting = checkpointing_setting(request.use_gradient_checkpointing)
    adapt(model, arch, setting)
    planner = getattr(model, PLANNER, None)
    if planner is not None:
        planner.recordings.is_on = request.cuda_graphs
    if widens(model):
        notice("fastllm: the residual stream is held in fp32, as this family's passes the range of fp16")
    if arch is not None and fp8_compute:
        use_fp8(model, decoder_layers(model, arch))
    checkpoint_blocks(model, setting)


def _train_everything(model: Any) -> None:
    setattr(model, TRAINED_IN_FULL, True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    planner = getattr(model, PLANNER, None)
    if planner is not None:
        planner.reserved_bytes = training_bytes(model)


def _attach_adapter(model: Any, adapter: str, request: LoadRequest) -> Any:
    from .adapters import load_adapter

    return load_adapter(model, adapter, **request.hub)


def _load_tokenizer(request: LoadRequest, source: Source, max_length: int) -> Any:
    """The tokenizer, or the processor of a model that sees images: of the adapter where it has one, else the base's."""
    options = {
        "max_length": max_length, "trust_remote_code": request.trust_remote_code, "padding_side": "left", **request.hub
    }  # fmt: skip
    files = ("processor_config.json", "preprocessor_config.json") if source.has_vision else ("tokenizer_config.json",)
    name = request.tokenizer_name or source.base
    if request.tokenizer_name is None and source.adapter is not None:
        own = any(os.path.isfile(os.path.join(source.adapter, file)) for file in files)
        name = source.adapter if own else name
    return load_processor(name, source.config, **options) if source.has_vision else load_tokenizer(name, **options)


def _banner(source: Source, precision: Precision, device: Device, max_seq_length: int, seconds: float) -> str:
    import transformers

    from .. import __version__
    from ..kernels.dispatch import HAS_TRITON

    memory = f"{device.total_bytes / 2**30:.1f} GiB" if device.total_bytes else "memory unknown"
    triton = "Triton kernels" if HAS_TRITON and device.kind in ("cuda", "rocm", "xpu") else "PyTorch reference kernels"
    adapter = f" with adapter {source.adapter}" if source.adapter else ""
    return (
        f"fastllm {__version__} | torch {torch.__version__} | transformers {transformers.__version__}\n"
        f"  {source.config.model_type}: {source.base}{adapter}\n"
        f"  {precision.label}; up to {max_seq_length:,} tokens; loaded in {seconds:.1f} s\n"
        f"  {device.name} ({memory}); {triton}"
    )


def _of(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}
