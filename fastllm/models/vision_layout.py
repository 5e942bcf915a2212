"""Which linear layers of a model belong to its language decoder and which to its vision tower, read from the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._errors import ArgumentError
from .patch import unwrapped

_ATTENTION = ("attn", "attention", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "dense", "mixer")


@dataclass(frozen=True)
class Parts:
    """The switches of `get_peft_model`: which parts of the model get adapters, and which layers of those parts."""

    vision: bool = True
    language: bool = True
    attention: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        if not (self.vision or self.language):
            raise ArgumentError(
                "finetune_vision_layers and finetune_language_layers are both off", where="get_peft_model",
                fix="switch one of them on",
            )  # fmt: skip
        if not (self.attention or self.mlp):
            raise ArgumentError(
                "finetune_attention_modules and finetune_mlp_modules are both off", where="get_peft_model",
                fix="switch one of them on",
            )  # fmt: skip

    @property
    def is_everything(self) -> bool:
        return self.vision and self.language and self.attention and self.mlp


def has_vision(model: Any) -> bool:
    return getattr(unwrapped(model).config, "vision_config", None) is not None


def decoder_name(model: nn.Module) -> str:
    """The dotted name of the language decoder, the module that `get_decoder` gives."""
    decoder = model.get_decoder()  # pyright: ignore[reportCallIssue]
    return next((name for name, module in model.named_modules() if module is decoder), "")


def target_pattern(model: Any, parts: Parts, names: Sequence[str] = (), layers: Sequence[int] | None = None) -> str:
    """A regular expression over module names for the linear layers of `parts`, as PEFT takes it.

    Only layers in repeated blocks count: heads, projectors and patch embeddings are left alone. `names` keeps those
    whose name ends so, `layers` those decoder layers.
    """
    found = {}
    for name, part in _block_linears(unwrapped(model)):
        if (parts.vision if part == "vision" else parts.language) and _has_kind(name, parts) and _ends(name, names):
            found[_pattern(name, layers if part == "language" else None)] = None
    if not found:
        wanted = f" called {', '.join(names)}" if names else ""
        raise ArgumentError(
            f"no linear layer{wanted} is in the parts asked for: {parts}", where="get_peft_model, target_modules",
            fix="switch on more of finetune_{vision_layers,language_layers,attention_modules,mlp_modules}",
        )  # fmt: skip
    return "|".join(found)


def outside_the_decoder(model: nn.Module) -> list[str]:
    """Names of the linear layers that are not the language decoder's: 4 and 8 bits spare tower, projector and head."""
    decoder = decoder_name(model) + "."
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if not name.startswith(decoder)]


def spared_by_quantization(auto_class: Any, config: Any, trust_remote_code: bool) -> list[str]:
    """`outside_the_decoder` of a model that is not loaded yet."""
    with torch.device("meta"):
        return outside_the_decoder(auto_class.from_config(config, trust_remote_code=trust_remote_code))


def _block_linears(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, "language" or "vision") of each linear layer inside a list of blocks."""
    decoder = decoder_name(model)
    lists = [name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(name.startswith(blocks) for blocks in lists):
            inside = not decoder or name.startswith(decoder + ".")
            yield name, "language" if inside else "vision"


def _pattern(name: str, layers: Sequence[int] | None) -> str:
    """The name with each number in it standing for any; the first for one of `layers`, where given."""
    numbers = iter([r"\d+" if layers is None else f"(?:{'|'.join(map(str, layers))})"])
    return r"\.".join(next(numbers, r"\d+") if part.isdigit() else re.escape(part) for part in name.split("."))


def _has_kind(name: str, parts: Parts) -> bool:
    components = name.split(".")
    is_attention = any(tag in component for component in components for tag in _ATTENTION)
    is_mlp = any(tag in component for component in components for tag in _MLP)
    return (parts.attention and is_attention) or (parts.mlp and is_mlp)


def _ends(name: str, names: Sequence[str]) -> bool:
    return not names or any(name == wanted or name.endswith("." + wanted) for wanted in names)
