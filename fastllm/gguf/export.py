"""From checkpoint tensors to a GGUF file, one tensor in memory at a time.

`export_plan` decides everything that the configuration and the tokenizer can decide: whether the model can be exported
at all, each tensor's type and place, the size of the file. `export_gguf` then only streams tensors to their places; the
file appears under its name when it is whole and has been read back.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._errors import UnsupportedError, nearest
from .._notices import notice
from .architectures import Layout, Target, architecture_of
from .atomic import require_space
from .container import GGUFError, TensorInfo, Value, data_bytes, encode_header, lay_out
from .quantizers import quantizer_of
from .recipes import ExplicitRecipe, Recipe, StaticMix, choose_types, static_mix
from .tensor_types import TensorType
from .vocabulary import SavedTokenizer, vocabulary_metadata
from .writer import GGUFWriter, gguf_writer

QUANTIZATION_VERSION = 2  # of ggml's block layouts
Progress = Callable[[int, int, str], object]
_NOT_EXPORTED = re.compile(r"(^|\.)(vision_tower|visual|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A GGUF file before it is written: everything but the weights.

    `layout` says which checkpoint tensor goes where; `tensors` is the table of the file, with the constants of the
    architecture among them.
    """

    architecture: str
    quantization: str
    metadata: dict[str, Value]
    layout: Layout
    tensors: list[TensorInfo]

    @property
    def num_bytes(self) -> int:
        """The exact size of the file."""
        return len(encode_header(self.metadata, self.tensors)) + data_bytes(self.tensors)

    @property
    def num_weights(self) -> int:
        return sum(_num_weights(info.shape) for info in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(info.num_bytes for info in self.tensors) / self.num_weights

    def describe(self) -> str:
        """One line: `llama, q4_k_m: 4,920,738,944 bytes, 4.90 bits per weight (Q4_K 193, Q6_K 33, F32 66)`."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(i.type.name for i in self.tensors).most_common())
        return (
            f"{self.architecture}, {self.quantization}: {self.num_bytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight ({kinds})"
        )


def export_plan(
    config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    quantization: str | Recipe,
    *,
    chat_template: str | None = None,
    name: str | None = None,
    has_importance: bool = False,
) -> ExportPlan:
    """Plan the export of a model with this `config.json` and the tokenizer saved in `tokenizer_dir`.

    `quantization` is the name of a llama-quantize mix (`q4_k_m`), an alias (`quantized`) or a recipe; `has_importance`
    tells the mixes that depend on it that an importance matrix will be there. Reads no weights.

    Raises `UnsupportedError` for an architecture, setting or quantization that can't be exported, `TokenizerError` for
    such a tokenizer, `ModelError` for a configuration that makes no sense.
    """
    architecture, model = architecture_of(config)
    recipe = _as_recipe(quantization, config)
    layout = architecture.layout(model)
    saved = SavedTokenizer.read(tokenizer_dir)
    types = choose_types(recipe, layout.shapes.items(), architecture.shape(model), has_importance)
    metadata: dict[str, Value] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": _model_name(name or _name_of(config), saved.strips_behind_special()),
        "general.quantized_by": "fastllm",
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": _file_type(recipe),
    }
    metadata |= architecture.metadata(model)
    metadata |= vocabulary_metadata(saved, layout.shapes["token_embd.weight"][0], chat_template)
    tensors = lay_out((tensor, shape, types[tensor]) for tensor, shape in layout.shapes.items())
    return ExportPlan(architecture.name, recipe.name, metadata, layout, tensors)


def export_gguf(
    outputs: Mapping[str | os.PathLike[str], str | Recipe],
    *,
    config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    importance: Mapping[str, torch.Tensor] | None = None,
    chat_template: str | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> list[ExportPlan]:
    """Write one GGUF file per entry of `outputs` (path: quantization) in one pass over the weights.

        export_gguf({"model.q4_k_m.gguf": "q4_k_m"}, config=config, tokenizer_dir="model", tensors=read("model"))

    Args:
        config: the model's `config.json`.
        tokenizer_dir: the folder that the tokenizer was saved to.
        tensors: (name, weights) of the model in any order, named as in a checkpoint or a live model, any float dtype.
        importance: mean squared input per column, [C] or [experts, C], by GGUF tensor name: an imatrix.
        chat_template: in place of the saved one.
        name: of the model, for `general.name`.
        device: where weights are quantized; None: where they come from.
        progress: called with (weights done, weights in all, tensor name).

    Returns: the plan of each file.
    Raises: what `export_plan` raises; `SaveError` where a file can't be written; `GGUFError` for a tensor that is
    missing, unknown, misshapen or not finite. No file is left under a final name then.
    """
    plans = {
        Path(path): export_plan(
            config,
            tokenizer_dir,
            quantization,
            chat_template=chat_template,
            name=name,
            has_importance=importance is not None,
        )
        for path, quantization in outputs.items()
    }
    require_space({path: plan.num_bytes for path, plan in plans.items()})
    for path, plan in plans.items():
        notice(f"fastllm: writing {path.name}: {plan.describe()}")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(gguf_writer(path, p.metadata, p.tensors)) for path, p in plans.items()]
        stream = _Stream(list(plans.values()), files, importance or {}, device, progress)
        stream.write_constants()
        for source, tensor in tensors:
            stream.write(source, tensor)
    return list(plans.values())


class _Stream:
    """Puts each checkpoint tensor into every file."""

    def __init__(
        self,
        plans: list[ExportPlan],
        files: list[GGUFWriter],
        importance: Mapping[str, torch.Tensor],
        device: torch.device | str | None,
        progress: Progress | None,
    ) -> None:
        self._layout, self._importance, self._device, self._progress = plans[0].layout, importance, device, progress
        self._files = [
            (file, {info.name: info.type for info in p.tensors}) for file, p in zip(files, plans, strict=True)
        ]
        self._done, self._total = 0, plans[0].num_weights
        unknown = [name for name in importance if name not in self._layout.shapes]
        if unknown:
            raise GGUFError(f"importance of {unknown[0]!r} {nearest(unknown[0], self._layout.shapes)}".rstrip())

    def write_constants(self) -> None:
        for name, tensor in self._layout.constants.items():
            self._place(name, tensor, None)

    def write(self, source: str, tensor: torch.Tensor) -> None:
        """Place one checkpoint tensor. Raises `GGUFError` for one that has no place or does not fit it."""
        canonical = canonical_name(source)
        targets = self._layout.targets.get(canonical)
        if targets is None:
            if _NOT_EXPORTED.search(source) or canonical == "lm_head.weight":
                kind = "the tied head" if canonical == "lm_head.weight" else "the vision part"
                notice(f"fastllm: {kind} is not in the GGUF file", once=f"gguf: {kind}")
                return
            raise GGUFError(f"no place for {source!r} {nearest(canonical, self._layout.targets)}".rstrip())
        for target in targets:
            self._write_target(source, tensor, target)

    def _write_target(self, source: str, tensor: torch.Tensor, target: Target) -> None:
        shape = self._layout.shapes[target.name]
        expected = shape if target.expert is None else shape[1:]
        try:
            part = target.change(tensor.detach().to(self._device or tensor.device))
        except RuntimeError as error:  # a reshape that the size does not allow
            raise GGUFError(f"{tuple(tensor.shape)} does not become {expected}", where=source) from error
        if tuple(part.shape) != expected:
            raise GGUFError(f"{tuple(tensor.shape)} becomes {tuple(part.shape)} and not {expected}", where=source)
        try:
            self._place(target.name, part, target.expert)
        except GGUFError as error:
            raise GGUFError(error.cause, where=source, fix=error.fix) from error

    def _place(self, name: str, tensor: torch.Tensor, expert: int | None) -> None:
        """Encode `tensor`, or one expert of it, for every file; a type that several files share is encoded once."""
        importance = self._importance.get(name)
        matrices = tensor.unbind(0) if tensor.dim() == 3 else [tensor.reshape(-1, tensor.shape[-1])]
        for i, rows in enumerate(matrices, start=expert or 0):
            weight = importance[i] if importance is not None and importance.dim() == 2 else importance
            encoded: dict[TensorType, torch.Tensor] = {}
            for file, types in self._files:
                kind = types[name]
                if kind not in encoded:
                    encoded[kind] = quantizer_of(kind).encode(rows, weight)
                file.write(name, encoded[kind], first_row=i * rows.shape[0])
        self._done += tensor.numel()
        if self._progress is not None:
            self._progress(self._done, self._total, name)


def canonical_name(source: str) -> str:
    """The name that a text-only model would give a tensor."""
    if source.startswith("language_model."):
        return source.removeprefix("language_model.")
    return re.sub(r"^model\.language_model\.", "model.", source)


def _as_recipe(quantization: str | Recipe, config: Mapping[str, Any]) -> Recipe:
    if isinstance(quantization, StaticMix | ExplicitRecipe):
        return quantization
    if not isinstance(quantization, str):
        raise UnsupportedError(f"quantization is {quantization!r}", where="gguf", fix='quantization="q4_k_m"')
    return static_mix(quantization, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def _file_type(recipe: Recipe) -> int:
    return (static_mix(recipe.base) if isinstance(recipe, ExplicitRecipe) else recipe).file_type


def _name_of(config: Mapping[str, Any]) -> str:
    return str(config.get("_name_or_path") or config.get("model_type")).rstrip("/\\").replace("\\", "/").split("/")[-1]


def _model_name(name: str, strips_behind_special: bool) -> str:
    """`name`, changed where it would mislead llama.cpp.

    It lets special tokens swallow the spaces behind them exactly where the name says `phi-3` or `phi3`, and does not
    load such a file without Phi 3's tokens.
    """
    is_called_phi3 = re.search("phi-?3", name, re.IGNORECASE) is not None
    if is_called_phi3 == strips_behind_special:
        return name
    changed = f"{name} (phi-3)" if strips_behind_special else re.sub("(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
    notice(f"fastllm: general.name is {changed!r}: llama.cpp takes from it how spaces behind special tokens are read")
    return changed


def _num_weights(shape: tuple[int, ...]) -> int:
    weights = 1
    for size in shape:
        weights *= size
    return weights
