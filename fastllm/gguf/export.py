"""From checkpoint tensors to GGUF files, one tensor in memory at a time.

`plan.py` decides everything that the configuration and the tokenizer can decide. `export_gguf` then only streams
tensors to their places; a file appears under its name when it is whole and has been read back.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .._errors import nearest
from .._notices import notice
from .architectures import Target
from .atomic import require_space
from .container import GGUFError
from .plan import ExportPlan, export_plan, mmproj_plan
from .quantizers import quantizer_of, regaining_factor
from .recipes import Recipe
from .tensor_types import TensorType
from .writer import GGUFWriter, gguf_writer

Progress = Callable[[int, int, str], object]
_VISION = re.compile(r"(^|\.)(vision_tower|visual|multi_modal_projector)\.")


def export_gguf(
    outputs: Mapping[str | os.PathLike[str], str | Recipe],
    *,
    config: Mapping[str, Any],
    tokenizer_dir: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    mmproj: Mapping[str | os.PathLike[str], str] | None = None,
    image_processor: Mapping[str, Any] | None = None,
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
        mmproj: path: type of the files for the vision tower and its projector, of f32, f16, bf16 and q8_0.
        image_processor: the configuration of the model's image processor, for those.
        importance: mean squared input per column, [C] or [experts, C], by GGUF tensor name: an imatrix.
        chat_template: in place of the saved one.
        name: of the model, for `general.name`.
        device: where weights are quantized; None: where they come from.
        progress: called with (weights done, weights in all, tensor name).

    Returns: the plan of each file.
    Raises: what `export_plan` and `mmproj_plan` raise; `SaveError` where a file can't be written; `GGUFError` for a
    tensor that is missing, unknown, misshapen or not finite. No file is left under a final name then.
    """
    models = {
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
    towers = {
        Path(path): mmproj_plan(config, image_processor or {}, kind, name=name) for path, kind in (mmproj or {}).items()
    }
    plans = models | towers
    require_space({path: plan.num_bytes for path, plan in plans.items()})
    for path, plan in plans.items():
        notice(f"fastllm: writing {path.name}: {plan.describe()}")
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(gguf_writer(path, p.metadata, p.tensors)) for path, p in plans.items()}
        done = _Progress(progress)
        streams = [
            _Stream([(plan, files[path]) for path, plan in part.items()], given, device, done)
            for part, given in ((models, importance or {}), (towers, {}))
            if part
        ]
        for stream in streams:
            stream.write_constants()
        for source, tensor in tensors:
            _write(streams, source, tensor)
    return list(plans.values())


def _write(streams: list[_Stream], source: str, tensor: torch.Tensor) -> None:
    """Place one checkpoint tensor. Raises `GGUFError` for one that has no place or does not fit it."""
    canonical = canonical_name(source)
    taking = [stream for stream in streams if canonical in stream.targets]
    for stream in taking:
        stream.write(source, tensor)
    if taking:
        return
    if canonical.endswith(".rotary_emb.inv_freq"):
        return
    if is_vision(canonical) or canonical == "lm_head.weight":
        kind = "the tied head" if canonical == "lm_head.weight" else "the vision part"
        notice(f"fastllm: {kind} is not in the GGUF file", once=f"gguf: {kind}")
        return
    known = [name for stream in streams for name in stream.targets]
    raise GGUFError(f"no place for {source!r} {nearest(canonical, known)}".rstrip())


class _Progress:
    """Tells how many weights of how many are done."""

    def __init__(self, tell: Progress | None) -> None:
        self._tell, self._done, self.total = tell, 0, 0

    def add(self, weights: int, name: str) -> None:
        self._done += weights
        if self._tell is not None:
            self._tell(self._done, self.total, name)


class _Stream:
    """Puts each checkpoint tensor into every one of the files that share a layout."""

    def __init__(
        self,
        files: list[tuple[ExportPlan, GGUFWriter]],
        importance: Mapping[str, torch.Tensor],
        device: torch.device | str | None,
        progress: _Progress,
    ) -> None:
        first, _ = files[0]
        self._layout, self._importance, self._device, self._progress = first.layout, importance, device, progress
        self._files = [(file, {info.name: info.type for info in plan.tensors}) for plan, file in files]
        progress.total += first.num_weights
        unknown = [name for name in importance if name not in self._layout.shapes]
        if unknown:
            raise GGUFError(f"importance of {unknown[0]!r} {nearest(unknown[0], self._layout.shapes)}".rstrip())

    @property
    def targets(self) -> Mapping[str, list[Target]]:
        """By canonical name, what this stream writes of a tensor."""
        return self._layout.targets

    def write_constants(self) -> None:
        for name, tensor in self._layout.constants.items():
            self._place(name, tensor, None)

    def write(self, source: str, tensor: torch.Tensor) -> None:
        for target in self.targets[canonical_name(source)]:
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
                    quantizer = quantizer_of(kind)
                    factor = regaining_factor(quantizer, rows, weight)
                    encoded[kind] = quantizer.encode(rows, weight, factor=factor)
                file.write(name, encoded[kind], first_row=i * rows.shape[0])
        self._progress.add(tensor.numel(), name)


def is_vision(source: str) -> bool:
    """Whether a tensor of this name belongs to a vision tower or its projector."""
    return _VISION.search(source) is not None


def canonical_name(source: str) -> str:
    """The name that a text-only model would give a tensor; of the vision part, that without the parts around it."""
    source = re.sub(r"^model\.(?=(visual|vision_tower|multi_modal_projector)\.)", "", source)
    source = source.replace("vision_tower.vision_model.", "vision_tower.")
    if source.startswith("language_model."):
        return source.removeprefix("language_model.")
    return re.sub(r"^model\.language_model\.", "model.", source)
