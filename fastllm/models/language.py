"""`FastLanguageModel`: the two calls that users type, with every argument of Unsloth's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import ArgumentError, UnsupportedError, reject_unknown
from .._notices import notice
from . import modes
from .adapters import AdapterRequest, add_adapter, within
from .loader import DefaultLength, LoadRequest, load, parse_dtype
from .trl_shim import install_trl_shim
from .vision_layout import Parts, has_vision

# Options of transformers' from_pretrained that pass through to every download.
_HUB_OPTIONS = (
    "token",
    "revision",
    "cache_dir",
    "local_files_only",
    "force_download",
    "subfolder",
    "variant",
    "proxies",
)
_LOAD_OPTIONS = ("quantization_config", "attn_implementation", "config", "tokenizer_name", "torch_dtype")
# Arguments that `LoadRequest` has under the same name.
_PASSED_ON = (
    "max_seq_length", "full_finetuning", "device_map", "rope_scaling", "fix_tokenizer", "trust_remote_code",
    "use_gradient_checkpointing", "resize_model_vocab", "text_only", "patch", "strict", "merge_micro_batches",
    "offload_embedding", "fp8_compute", "cuda_graphs",
)  # fmt: skip
DEFAULT_LENGTH = DefaultLength(2048)
_HEAD_OPTIONS = ("num_labels", "id2label", "label2id", "problem_type")
# Arguments of features that are not here yet: name -> (value that asks for nothing, what it would do).
_LATER = {
    "load_in_fp8": (False, "weights stored in FP8 (fp8_compute=True multiplies in FP8)"),
    "fast_inference": (False, "generation through vLLM"),
    "qat_scheme": (None, "quantization-aware training"),
    "unsloth_tiled_mlp": (False, "an MLP tiled along the sequence"),
}
# Arguments that only matter to vLLM: name -> default.
_VLLM_ONLY = {"gpu_memory_utilization": 0.5, "float8_kv_cache": False, "max_lora_rank": 64, "disable_log_stats": True}


class FastLanguageModel:
    """Loads causal language models for fine-tuning and adds LoRA adapters to them."""

    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/Llama-3.2-1B-Instruct",
        max_seq_length: int | None = DEFAULT_LENGTH,
        dtype: Any = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        load_in_fp8: bool | str = False,
        token: str | None = None,
        device_map: Any = "sequential",
        rope_scaling: Mapping[str, Any] | None = None,
        fix_tokenizer: bool = True,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = "unsloth",
        resize_model_vocab: int | None = None,
        revision: str | None = None,
        use_exact_model_name: bool = False,
        offload_embedding: bool = False,
        float32_mixed_precision: bool | None = None,
        fast_inference: bool = False,
        gpu_memory_utilization: float = 0.5,
        float8_kv_cache: bool = False,
        random_state: int = 3407,
        max_lora_rank: int = 64,
        disable_log_stats: bool = True,
        qat_scheme: str | None = None,
        unsloth_tiled_mlp: bool | str = False,
        text_only: bool = False,
        patch: bool = True,
        strict: bool = False,
        merge_micro_batches: bool = True,
        fp8_compute: bool = False,
        cuda_graphs: bool = True,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Load a checkpoint, or an adapter together with its base. Returns `(model, tokenizer)`.

        Args:
            model_name: a folder, a hub repository, or a folder or repository that holds a PEFT adapter. It is loaded
                exactly as named (`use_exact_model_name` is always on).
            max_seq_length: context length in tokens; the checkpoint's own for None, and where that is shorter than the
                default. A length past the native one scales RoPE, and it is said.
            dtype: None for the machine's choice (bf16, fp16 where bf16 is not native, fp32 on a CPU), a torch dtype or
                its name.
            load_in_4bit, load_in_8bit, load_in_16bit, full_finetuning: how the base is held. Each of the last three
                switches the default 4-bit off. 4-bit is NF4 with double quantization.
            use_gradient_checkpointing: `"fastllm"` (alias `"unsloth"`) plans recomputation from the free memory,
                `"offload"` uses the least memory, True recomputes every layer, False none.
            float32_mixed_precision: with full_finetuning, True holds the weights in fp32.
            offload_embedding: keeps the input embedding in host memory, unless it is the head too.
            merge_micro_batches: gradient accumulation of an SFTTrainer runs as fewer, larger batches where its own are
                too small to fill the GPU and memory is free. The optimiser steps are the same.
            patch: False leaves the model to transformers' own code. `strict` raises where an architecture has no fast
                classes, instead of doing that with a notice.
            fp8_compute: multiply the frozen weights of the decoder layers in FP8 (e4m3, scaled by row), forward and
                backward, on GPUs that have it (compute capability 8.9 and later). Off by default, since it changes the
                results: each product is off by 3.8 % (L2). The gradient of batches from 2,048 tokens on comes through
                a frozen head in FP8 too. Norms, attention, logits and loss stay in bf16, and of LoRA all but its terms
                in those products, which keep 8 bits of each value. It does not read checkpoints stored in FP8, which
                `load_in_fp8` asks for.
            cuda_graphs: layers of batches of up to 4,096 tokens (8,192 with `fp8_compute`) are launched as CUDA graphs
                from the third batch of a shape on, where memory is left beside the largest batch. The results are the
                same.
            **options: `quantization_config`, `attn_implementation`, `config`, `tokenizer_name`, and transformers'
                download options (`cache_dir`, `local_files_only`, `force_download`, `subfolder`, `variant`, `proxies`).

        Raises:
            ArgumentError: an unknown or contradictory argument.
            ModelError, TokenizerError: the checkpoint can't be used, with the reason.
            UnsupportedError: a feature of Unsloth that this version does not have.
        """
        return load_with("FastLanguageModel.from_pretrained", locals())

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: Sequence[str] | str = (
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ),
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: Sequence[int] | int | None = None,
        layers_pattern: str | None = None,
        use_gradient_checkpointing: bool | str = "unsloth",
        random_state: int = 3407,
        max_seq_length: int = 2048,
        use_rslora: bool = False,
        modules_to_save: Sequence[str] | None = None,
        init_lora_weights: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        temporary_location: str = "_unsloth_temporary_saved_buffers",
        qat_scheme: str | None = None,
        target_parameters: Sequence[str] | None = None,
        ensure_weight_tying: bool = False,
        use_dora: bool = False,
        finetune_last_n_layers: int | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Add LoRA adapters. Returns a `peft.PeftModel` whose layers run fused where they can.

        Args:
            r, lora_alpha, lora_dropout, bias, use_rslora, use_dora, layers_to_transform, layers_pattern,
            target_parameters, ensure_weight_tying: as in `peft.LoraConfig`. Dropout and bias keep the fast path.
            target_modules: a list, one regular expression, `"all-linear"`, or a list written as a string. In a list,
                `embed_tokens` and `lm_head` are trained in full, as `modules_to_save`.
            finetune_last_n_layers: adapters on the last n decoder layers only.
            use_gradient_checkpointing: see `from_pretrained`.
            random_state: seeds Python, NumPy and torch.
            init_lora_weights: True, False, "gaussian", "loftq" (with a base that is not 4-bit), or another of PEFT's.
            max_seq_length, temporary_location: accepted for compatibility; nothing here depends on them.
            **options: further fields of `peft.LoraConfig`.

        Raises:
            ArgumentError: an unknown argument, or targets that match nothing in the model.
        """
        where = "FastLanguageModel.get_peft_model"
        parts = Parts(vision=False) if has_vision(model) else None
        return adapt_with(where, locals(), parts, FastLanguageModel.get_peft_model)

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode. The model trains and generates in any mode; this switches dropout and the padding side."""
        return modes.for_training(model, use_gradient_checkpointing)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Evaluation mode: dropout off, padding left, key-value cache on."""
        return modes.for_inference(model)


def load_with(where: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """Check the arguments of a `from_pretrained`, `given` by name, and load the model."""
    options = given["options"]
    _refuse_later(where, {name: given[name] for name in _LATER})
    _explain_vllm_only({name: given[name] for name in _VLLM_ONLY})
    if any(options.get(name) is not None for name in _HEAD_OPTIONS):
        raise UnsupportedError("classification heads are not part of this version", where=where)
    reject_unknown(where, options, [*_HUB_OPTIONS, *_LOAD_OPTIONS, *_HEAD_OPTIONS, *_parameters(given)])
    install_trl_shim()
    hub = {name: given.get(name, options.get(name)) for name in _HUB_OPTIONS}
    dtype = given["dtype"] if given["dtype"] is not None else options.get("torch_dtype")
    request = LoadRequest(
        model_name=_checked_name(given["model_name"]),
        dtype=parse_dtype(dtype),
        bits=_bits(given["load_in_4bit"], given["load_in_8bit"], given["load_in_16bit"], given["full_finetuning"]),
        float32_weights=bool(given["float32_mixed_precision"]),
        hub={name: value for name, value in hub.items() if value is not None},
        **{name: given[name] for name in _PASSED_ON},
        **{name: options.get(name) for name in _LOAD_OPTIONS if name != "torch_dtype"},
    )
    return load(request)


def adapt_with(where: str, given: Mapping[str, Any], parts: Parts | None, call: Any) -> Any:
    """Check the arguments of `call`, a `get_peft_model`, `given` by name, and add the adapter to `parts`."""
    _refuse_later(where, {"qat_scheme": given["qat_scheme"]})
    fields = [field.name for field in dataclasses.fields(AdapterRequest)]
    request = AdapterRequest(**{name: given[name] for name in fields})
    model = given["model"]
    if parts is not None:
        request = within(model, request, parts)
    return add_adapter(model, request, known=[name for name in call.__annotations__ if name != "return"])


def _parameters(given: Mapping[str, Any]) -> list[str]:
    return [name for name in given if name not in ("options", "where")]


def _checked_name(name: Any) -> str:
    if not isinstance(name, (str,)) and not hasattr(name, "__fspath__"):
        raise ArgumentError(
            f"got a {type(name).__name__}", where="model_name", fix='pass a folder or a repository, "org/name"'
        )
    return str(name)


def _bits(four: bool, eight: bool, sixteen: bool, full: bool) -> int:
    """The base's bits a weight. The default 4-bit gives way to an explicit request; two explicit ones contradict."""
    asked = [
        name for name, on in (("load_in_8bit", eight), ("load_in_16bit", sixteen), ("full_finetuning", full)) if on
    ]
    if len(asked) > 1:
        raise ArgumentError(
            f"{' and '.join(asked)} exclude each other", where="from_pretrained", fix="keep one of them"
        )
    if eight:
        return 8
    return 16 if sixteen or full or not four else 4


def _refuse_later(where: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        off, what = _LATER[name]
        if value not in (off, None, False):
            raise UnsupportedError(
                f"{name}={value!r} asks for {what}, which is not part of this version",
                where=where,
                fix=f"leave {name} out",
            )


def _explain_vllm_only(given: Mapping[str, Any]) -> None:
    changed = [name for name, value in given.items() if value != _VLLM_ONLY[name]]
    if changed:
        notice(f"fastllm: {', '.join(changed)} only matter with fast_inference=True and are not used")
