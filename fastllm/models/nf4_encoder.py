"""Weights in the form in which bitsandbytes and transformers store 4-bit linear layers, one weight at a time.

transformers itself decides which layers are quantized (it would have to read them back), and bitsandbytes quantizes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from .._errors import ArgumentError, nearest
from ..kernels.nf4 import dequantize_nf4
from .checkpoints import TensorEntry, dtype_name
from .lora_view import nf4_weight
from .quantized import bitsandbytes_config
from .vision_layout import has_vision, outside_the_decoder
from .weight_names import NameMap

# Room for the JSON that bitsandbytes stores as bytes. Its length depends on the digits of a mean; blanks fill the rest.
_STATE_BYTES = 256
_STATISTICS_BLOCK = 256


class Nf4Encoder:
    """`entries` and `encode` for the weights of linear layers; other tensors stay as they are.

    `config` is the quantization config that the saved model needs. Quantizing happens on the device of `model`. Layers
    that a loaded 4-bit model leaves in 16 bits stay so, unless `every_layer` is to be 4-bit that can be. A vision tower
    always does: no text tells what it would lose.
    """

    def __init__(self, model: Any, twin: Any, names: NameMap, dtype: torch.dtype, *, every_layer: bool = False) -> None:
        from transformers.quantizers.auto import AutoHfQuantizer

        given: Any = getattr(model.config, "quantization_config", None)
        is_4bit = bool(getattr(given, "load_in_4bit", False))
        self.config: Any = copy.deepcopy(given) if is_4bit else bitsandbytes_config(4, dtype)
        if every_layer:
            self.config.llm_int8_skip_modules = None
        if has_vision(model):
            spared = {*(self.config.llm_int8_skip_modules or ()), *outside_the_decoder(twin)}
            self.config.llm_int8_skip_modules = sorted(spared)
        self._dtype, self._device = dtype, model.device
        quantizer = AutoHfQuantizer.from_config(self.config, pre_quantized=False)
        quantizer.preprocess_model(model=twin, dtype=dtype, device_map={"": "cpu"})
        templates = {name: p for name, p in twin.named_parameters() if hasattr(p, "quant_type")}
        self._templates: dict[str, Any] = {
            stored: templates[part.name] for stored, part in names.parts.items() if part.name in templates
        }
        # stored name -> name of the module in the model
        self.modules = {stored: names.parts[stored].name.removesuffix(".weight") for stored in self._templates}
        self._never = [name for name, module in twin.named_modules() if type(module) is nn.Linear]

    def keep(self, modules: Collection[str]) -> None:
        """Leave these modules in 16 bits. Raises `ArgumentError` for one that is no 4-bit layer."""
        unknown = [name for name in modules if name not in self.modules.values()]
        if unknown:
            raise ArgumentError(
                f"{unknown[0]!r} is not a linear layer of this model that 4 bits could hold"
                f" {nearest(unknown[0], self.modules.values())}".rstrip(),
                where="recipe", fix="use the recipe of a model of the same architecture and size",
            )  # fmt: skip
        self.modules = {stored: name for stored, name in self.modules.items() if name not in modules}
        self.config.llm_int8_skip_modules = [*self._never, *modules]

    def entries(self, entry: TensorEntry) -> list[TensorEntry]:
        """What is stored for a tensor."""
        if not self.is_quantized(entry.name):
            return [entry]
        template = self._templates[entry.name]
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
        packed = self._packed(name, values)
        packed.quant_state.dtype = self._dtype
        stored = {f"{name}.{key}": part for key, part in packed.quant_state.as_dict(packed=True).items()}
        for key, part in stored.items():
            if ".quant_state." in key:
                blanks = torch.full((_STATE_BYTES - part.numel(),), ord(" "), dtype=torch.uint8)
                stored[key] = torch.cat((part.cpu(), blanks))
        return {name: packed.data, **stored}

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """The numbers that the 4-bit form of `values` stands for, fp32 on the device of the model."""
        packed = self._packed(name, values)
        return dequantize_nf4(nf4_weight(packed, packed.quant_state), torch.float32)

    def _packed(self, name: str, values: torch.Tensor) -> Any:
        template = self._templates[name]
        settings = {**template.__dict__, "module": None}
        return type(template)(values, requires_grad=False, **settings).to(self._device)

    def is_quantized(self, name: str) -> bool:
        """Whether the stored tensor `name` becomes a 4-bit one."""
        return name in self.modules
