"""4-bit and 8-bit loading. Besides the optimizers, the only module that imports bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from .._errors import ArgumentError, MissingPackageError


def bitsandbytes_config(bits: int, compute_dtype: torch.dtype) -> Any:
    """transformers' quantization config: NF4 with double quantization, or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"{bits}-bit loading needs bitsandbytes", where="from_pretrained", fix="pip install bitsandbytes"
        )
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def given_config(quantization_config: Any) -> Any:
    """A `quantization_config` argument as transformers takes it, from an object or a dict of its fields."""
    if isinstance(quantization_config, dict):
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig.from_dict(quantization_config)
    if not hasattr(quantization_config, "quant_method"):
        raise ArgumentError(
            f"got a {type(quantization_config).__name__}",
            where="quantization_config",
            fix="pass a transformers.BitsAndBytesConfig or a dict of its fields",
        )
    return quantization_config


def in_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the parts of a stored quantized model that are not quantized the dtype it was asked for in.

    transformers casts their biases and leaves their weights as they are stored, so a bf16 checkpoint that is loaded in
    fp16, as on a T4, would mix the two.
    """
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]  # fmt: skip
    for name, parameter in model.named_parameters():
        is_plain = parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)
        if is_plain and parameter.dtype != dtype and not set(kept).intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def unpack_cpu_weight(module: Any) -> None:
    """Undo the repacking that bitsandbytes does to a 4-bit layer when it runs in evaluation mode on a CPU with AVX-512:
    the packed layout serves inference only."""
    from bitsandbytes.nn.modules import _convert_weight_packed_for_cpu_inverse

    weight = module.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
