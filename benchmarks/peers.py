"""How each library loads a base model and puts LoRA on it, by its own documented calls."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from .cases import CHECKPOINTING, LOADING

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The same layers of the decoder and of a vision tower.
VISION_PROJECTIONS = r".*\.(" + "|".join([*PROJECTIONS, "qkv", r"attn\.proj"]) + ")$"
# The module by which each library is known to be installed.
MODULES = {"hf": "peft", "liger": "liger_kernel", "unsloth": "unsloth", "fastllm": "fastllm"}


@dataclass(frozen=True)
class Setting:
    """One way to train: bits of the base (4, 16, or 0 for full fine-tuning) and the LoRA rank."""

    model: str
    bits: int
    rank: int
    way: str
    sequence: int
    vision: bool = False
    dtype: str = "bfloat16"


def load(peer: str, setting: Setting) -> tuple[Any, Any]:
    """The model of a peer, ready to train, and the tokenizer or processor that a trainer takes beside it."""
    value = CHECKPOINTING[peer][setting.way]
    if peer in ("unsloth", "fastllm"):
        return _load_unsloth_style(peer, setting, value)
    return _load_hf(peer, setting, bool(value))


def _load_unsloth_style(peer: str, setting: Setting, checkpointing: bool | str) -> tuple[Any, Any]:
    import torch

    module = importlib.import_module(peer)
    library = module.FastVisionModel if setting.vision else module.FastLanguageModel
    model, processing_class = library.from_pretrained(
        setting.model, max_seq_length=max(2048, setting.sequence), dtype=getattr(torch, setting.dtype),
        load_in_4bit=setting.bits == 4, full_finetuning=setting.bits == 0, use_gradient_checkpointing=checkpointing,
        **LOADING.get((peer, setting.way), {}),
    )  # fmt: skip
    if setting.bits:
        targets = {"finetune_vision_layers": True} if setting.vision else {"target_modules": PROJECTIONS}
        model = library.get_peft_model(
            model, r=setting.rank, lora_alpha=setting.rank, lora_dropout=0, bias="none", random_state=3407,
            use_gradient_checkpointing=checkpointing, max_seq_length=max(2048, setting.sequence), **targets,
        )  # fmt: skip
    library.for_training(model)
    return model, processing_class


def _load_hf(peer: str, setting: Setting, checkpointing: bool) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    if peer == "liger":
        import liger_kernel.transformers

        family = AutoConfig.from_pretrained(setting.model).model_type
        getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{family}")()
    dtype = getattr(torch, setting.dtype)
    quantization = None
    if setting.bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    device = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    loader = AutoModelForImageTextToText if setting.vision else AutoModelForCausalLM
    model = loader.from_pretrained(setting.model, quantization_config=quantization, dtype=dtype, device_map=device)
    model.config.use_cache = False
    kwargs = {"use_reentrant": False}
    if setting.bits == 4:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=kwargs
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(kwargs)
        model.enable_input_require_grads()
    if setting.bits:
        targets = VISION_PROJECTIONS if setting.vision else PROJECTIONS
        task = None if setting.vision else "CAUSAL_LM"
        lora = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=targets, task_type=task)
        model = get_peft_model(model, lora)
    model.train()
    return model, AutoTokenizer.from_pretrained(setting.model)
