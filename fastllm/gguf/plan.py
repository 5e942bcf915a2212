"""What a GGUF file will hold, decided before any weight is read: types, places, size and metadata."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._errors import UnsupportedError, nearest
from .._notices import notice
from .architectures import Layout, architecture_of, normalization, projector_of, tell_sizes
from .container import TensorInfo, Value, data_bytes, encode_header, lay_out
from .recipes import ExplicitRecipe, Recipe, StaticMix, choose_types, fitting_type, static_mix, tell_narrowed
from .tensor_types import F16, F32, TensorType
from .vocabulary import SavedTokenizer, vocabulary_metadata

QUANTIZATION_VERSION = 2  # of ggml's block layouts
MMPROJ_TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A GGUF file before it is written: everything but the weights.

    `layout` says which checkpoint tensor goes where; `tensors` is the table of the file, with the constants of the
    architecture among them. `mmproj` is the plan of the file with the vision tower that goes beside it.
    """

    architecture: str
    quantization: str
    metadata: dict[str, Value]
    layout: Layout
    tensors: list[TensorInfo]
    mmproj: ExportPlan | None = None

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
        """One line, `llama, q4_k_m: 4,920,738,944 bytes, 4.90 bits per weight (Q4_K 193, Q6_K 33, F32 66)`, and one
        more for the mmproj file of a vision-language model."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(i.type.name for i in self.tensors).most_common())
        beside = f"\n{self.mmproj.describe()}" if self.mmproj is not None else ""
        return (
            f"{self.architecture}, {self.quantization}: {self.num_bytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight ({kinds}){beside}"
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


def mmproj_plan(
    config: Mapping[str, Any], image_processor: Mapping[str, Any], quantization: str = "f16", *, name: str | None = None
) -> ExportPlan:
    """Plan the `mmproj` file of a vision-language model: its vision tower and projector, for llama.cpp's `clip`.

    `image_processor` is its saved configuration; its mean and deviation go into the file. `quantization` is f32, f16,
    bf16 or q8_0; biases, norms and positions are F32 in all of them. Reads no weights.

    Raises `UnsupportedError` for a tower, setting or quantization that can't be exported, `ModelError` for a
    configuration that makes no sense.
    """
    found = projector_of(config)
    if found is None:
        raise UnsupportedError(f"{config.get('model_type')!r} has no vision tower", where="mmproj")
    projector, vision = found
    kind = _mmproj_type(quantization)
    tell_sizes(projector, vision, image_processor)
    layout = projector.layout(vision)
    metadata: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": name or _name_of(config),
        "general.quantized_by": "fastllm",
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": kind.file_type,
        "clip.projector_type": projector.name,
    }
    metadata |= projector.metadata(vision) | normalization(image_processor)
    types = {tensor: _vision_type(tensor, shape, kind.base) for tensor, shape in layout.shapes.items()}
    fitting = {tensor: fitting_type(types[tensor], shape[-1]) for tensor, shape in layout.shapes.items()}
    tell_narrowed(types, fitting)
    tensors = lay_out((tensor, shape, fitting[tensor]) for tensor, shape in layout.shapes.items())
    return ExportPlan("clip", kind.name, metadata, layout, tensors)


def _mmproj_type(quantization: str) -> StaticMix:
    kind = str(quantization).lower()
    if kind not in MMPROJ_TYPES:
        raise UnsupportedError(
            f"an mmproj file is not stored as {quantization!r} {nearest(kind, MMPROJ_TYPES)}".rstrip(),
            where="mmproj_type", fix=f"one of {', '.join(MMPROJ_TYPES)}",
        )  # fmt: skip
    return static_mix(kind)


def _vision_type(name: str, shape: tuple[int, ...], kind: TensorType) -> TensorType:
    """llama.cpp adds positions and biases in F32, and takes kernels and Gemma's projection, which it transposes, in F16
    or F32."""
    if len(shape) == 1 or "position_embd" in name or kind is F32:
        return F32
    if "patch_embd" in name or name == "mm.input_projection.weight":
        return F16
    return kind


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
