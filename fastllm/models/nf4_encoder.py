"""Weights in the form in which bitsandbytes and transformers store 4-bit linear layers, one weight at a time.

transformers itself decides which layers are quantized (it would have to read them back), and bitsandbytes quantizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .checkpoints import TensorEntry, dtype_name
from .quantized import bitsandbytes_config
from .weight_names import NameMap

# Room for the JSON that bitsandbytes stores as bytes. Its length depends on the digits of a mean; blanks fill the rest.
_STATE_BYTES = 256
_STATISTICS_BLOCK = 256


class Nf4Encoder:
    """`entries` and `encode` for the weights of linear layers; other tensors stay as they are.

    `config` is the quantization config that the saved model needs. Quantizing happens on the device of `model`.
    """

    def __init__(self, model: Any, twin: Any, names: NameMap, dtype: torch.dtype) -> None:
        from transformers.quantizers.auto import AutoHfQuantizer

        given: Any = getattr(model.config, "quantization_config", None)
        is_4bit = bool(getattr(given, "load_in_4bit", False))
        self.config: Any = given if is_4bit else bitsandbytes_config(4, dtype)
        self._dtype, self._device = dtype, model.device
        quantizer = AutoHfQuantizer.from_config(self.config, pre_quantized=False)
        quantizer.preprocess_model(model=twin, dtype=dtype, device_map={"": "cpu"})
        loaded = {name: part.name for name, part in names.parts.items()}
        templates = {name: p for name, p in twin.named_parameters() if hasattr(p, "quant_type")}
        self._templates: dict[str, Any] = {
            stored: templates[name] for stored, name in loaded.items() if name in templates
        }

    def entries(self, entry: TensorEntry) -> list[TensorEntry]:
        """What is stored for a tensor."""
        template = self._templates.get(entry.name)
        if template is None:
            return [entry]
        values = math.prod(entry.shape)
        blocks = math.ceil(values / template.blocksize)
        name, nested = entry.name, template.compress_statistics
        storage = template.quant_storage
        state = f"{name}.quant_state.bitsandbytes__{template.quant_type}"
        found = [
            TensorEntry(name, dtype_name(storage), (math.ceil(values / 2 / storage.itemsize), 1)),
            TensorEntry(f"{name}.absmax", "U8" if nested else "F32", (blocks,)),
            TensorEntry(f"{name}.quant_map", "F32", (16,)),
            TensorEntry(state, "U8", (_STATE_BYTES,)),
        ]
        if nested:
            found += [
                TensorEntry(f"{name}.nested_absmax", "F32", (math.ceil(blocks / _STATISTICS_BLOCK),)),
                TensorEntry(f"{name}.nested_quant_map", "F32", (256,)),
            ]
        return found

    def encode(self, name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of `entries` for float `values` [N, K]."""
        template = self._templates[name]
        settings = {**template.__dict__, "module": None}
        packed = type(template)(values, requires_grad=False, **settings).to(self._device)
        packed.quant_state.dtype = self._dtype
        stored = {f"{name}.{key}": part for key, part in packed.quant_state.as_dict(packed=True).items()}
        for key, part in stored.items():
            if ".quant_state." in key:
                blanks = torch.full((_STATE_BYTES - part.numel(),), ord(" "), dtype=torch.uint8)
                stored[key] = torch.cat((part.cpu(), blanks))
        return {name: packed.data, **stored}

    def is_quantized(self, name: str) -> bool:
        """Whether the stored tensor `name` becomes a 4-bit one."""
        return name in self._templates
