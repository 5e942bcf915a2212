"""How each library loads a base model and puts LoRA on it, by its own documented calls."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What each library calls the three ways to hold activations.
CHECKPOINTING = {
    "hf": {"least": True, "none": False},
    "liger": {"least": True, "none": False},
    "unsloth": {"least": "unsloth", "none": False, "default": "unsloth"},
    "fastllm": {"least": "offload", "none": False, "default": "fastllm"},
}


@dataclass(frozen=True)
class Setting:
    """One way to train: bits of the base (4, 16, or 0 for full fine-tuning) and the LoRA rank."""

    model: str
    bits: int
    rank: int
    checkpointing: str
    sequence: int


def load(peer: str, setting: Setting) -> Any:
    """The model of a peer, ready to train."""
    value = CHECKPOINTING[peer][setting.checkpointing]
    return (
        _load_unsloth_style(peer, setting, value) if peer in ("unsloth", "fastllm") else _load_hf(peer, setting, value)
    )


def _load_unsloth_style(peer: str, setting: Setting, checkpointing: Any) -> Any:
    import torch

    library = importlib.import_module(peer).FastLanguageModel
    model, _ = library.from_pretrained(
        setting.model, max_seq_length=setting.sequence, dtype=torch.bfloat16, load_in_4bit=setting.bits == 4,
        full_finetuning=setting.bits == 0, use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    if setting.bits:
        model = library.get_peft_model(
            model, r=setting.rank, lora_alpha=setting.rank, lora_dropout=0, bias="none", target_modules=PROJECTIONS,
            use_gradient_checkpointing=checkpointing, random_state=3407, max_seq_length=setting.sequence,
        )  # fmt: skip
    library.for_training(model)
    return model


def _load_hf(peer: str, setting: Setting, checkpointing: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if peer == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantization = None
    if setting.bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    device = {"": 0} if torch.cuda.is_available() else {"": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        setting.model, quantization_config=quantization, dtype=torch.bfloat16, device_map=device
    )
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
        lora = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model.train()
    return model
