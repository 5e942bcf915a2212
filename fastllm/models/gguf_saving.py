"""Saving a trained model as GGUF files: merged tensor by tensor and quantized on the way, with no model in between.

A merge plan (`merge_plan`) says what each tensor is, `fastllm.gguf` where it goes and in which type. A vision-language
model becomes two files, the language model and its `mmproj`, in the same pass. What is decided without weights,
`plan_gguf` answers before any training.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._errors import ArgumentError, FastllmError, UnsupportedError, nearest
from .._notices import notice
from ..gguf import (
    ExplicitRecipe,
    ExportPlan,
    Recipe,
    export_gguf,
    export_plan,
    mmproj_plan,
    static_mix,
    write_lora_gguf,
)
from ..gguf.architectures import Layout, Target, architecture_of
from ..gguf.atomic import atomic_file, require_space
from ..gguf.dynamic import candidates, dynamic_base, dynamic_recipe
from ..gguf.export import canonical_name
from ..gguf.importance import load_imatrix
from ..gguf.sensitivity import SAMPLED_ROWS, embedding_divergences, expected_divergences
from ..gguf.tensor_types import TensorType
from ..text.ollama import modelfile_of
from .adapted_weights import read_adapters
from .calibration import CalibrationData, Moments, calibrate
from .gguf_processor import chat_template_of, image_settings, processor_of, saved_tokenizer, tokenizer_of
from .merge_plan import MergePlan, plan_merge
from .merging import finite_block, merged_config, tell_source
from .modes import release_for_saving
from .patch import unwrapped

_DEFAULT = "fast_quantized"
_DYNAMIC_DEFAULT = "dynamic_q4_k_m"
_AHEAD = 4  # so many tensors before one is needed, the disk begins to read it
_SAVE_METHODS = (None, "merged_16bit", "lora")
_LORA_TYPES = {"fast_quantized": "f16", "not_quantized": "f16", "auto": "f16"} | {
    name: name for name in ("f32", "f16", "bf16", "q8_0")
}


@dataclass(frozen=True)
class GgufRequest:
    """The arguments of `save_pretrained_gguf` that decide what is written. `folder` is where the files go."""

    folder: Path
    tokenizer: Any = None
    quantization_method: Any = _DEFAULT
    mmproj_type: str = "f16"
    save_method: str | None = None
    imatrix_file: Any = None
    calibration: CalibrationData | None = None
    target_bpw: float | None = None
    max_size: int | str | None = None


@dataclass(frozen=True)
class _Method:
    """One quantization asked for: a recipe, or with `is_dynamic` the static mix whose place a dynamic one takes."""

    recipe: Recipe
    is_dynamic: bool = False

    @property
    def label(self) -> str:
        """The part of the file's name that says how it is quantized."""
        return re.sub(r"[^\w.-]+", "_", f"{'dynamic_' if self.is_dynamic else ''}{self.recipe.name}".upper())


def plan_gguf(
    model: Any, tokenizer: Any = None, quantization_method: Any = _DEFAULT, mmproj_type: str = "f16"
) -> ExportPlan:
    """What exporting the model would write, from its configuration and tokenizer alone.

    Raises `UnsupportedError` for an architecture, setting or quantization that can't be exported, `TokenizerError` for
    a tokenizer that llama.cpp can't reproduce.
    """
    model = unwrapped(model)
    request = GgufRequest(Path(), tokenizer, quantization_method, mmproj_type)
    method, *others = _methods(request, str(model.dtype))
    if others:
        raise ArgumentError(
            f"got {1 + len(others)} methods", where="export_plan", fix="ask for the plan of one method at a time"
        )
    with saved_tokenizer(tokenizer_of(model, tokenizer)) as tokenizer_dir:
        plan = export_plan(
            model.config.to_dict(), tokenizer_dir, method.recipe, chat_template=chat_template_of(model, tokenizer),
            name=base_name(model),
        )  # fmt: skip
    return replace(plan, mmproj=_mmproj_plan(model, request))


def check_request(model: Any, request: GgufRequest) -> None:
    """Raise for what `save_gguf` would refuse without having seen any weight."""
    if request.save_method not in _SAVE_METHODS:
        raise ArgumentError(
            f"got {request.save_method!r} {nearest(str(request.save_method), ['merged_16bit', 'lora'])}".rstrip(),
            where="save_method", fix='leave it out for the merged model, or save_method="lora" for the adapter alone',
        )  # fmt: skip
    model = unwrapped(model)
    architecture_of(model.config.to_dict())
    if request.save_method == "lora":
        _lora_type(request)
        return
    tokenizer_of(model, request.tokenizer)
    _mmproj_plan(model, request)
    methods = _methods(request, str(model.dtype))
    if request.calibration is None and any(method.is_dynamic for method in methods):
        raise ArgumentError(
            "dynamic quantization measures on data which tensors need more bits, and there is none",
            where="quantization_method", fix="calibration_dataset=dataset, for example the one that was trained on",
        )  # fmt: skip


def save_gguf(model: Any, request: GgufRequest) -> dict[str, Any]:
    """Write what is asked for and a Modelfile. Returns Unsloth's table of what was written.

    Raises:
        ArgumentError: methods or sizes that do not exist or contradict each other; calibration data that is missing.
        UnsupportedError: an architecture, setting, type or adapter that GGUF or this version does not serve.
        TokenizerError: no tokenizer, or one that llama.cpp can't reproduce.
        SaveError: the disk is too small, or the folder can't be written.
    """
    model = unwrapped(model)
    check_request(model, request)
    if request.save_method == "lora":
        return _written(request, [_save_lora(model, request)], None, full_precision=True)
    release_for_saving(model)
    tokenizer = tokenizer_of(model, request.tokenizer)
    template = chat_template_of(model, request.tokenizer)
    methods = _methods(request, str(model.dtype))
    plan = plan_merge(model)
    tell_source(model, plan)
    source = _Source(model, tokenizer, plan, merged_config(model, plan).to_dict())
    with saved_tokenizer(tokenizer) as tokenizer_dir:
        paths = {request.folder / f"{base_name(model)}.{method.label}.gguf": method for method in methods}
        static = {
            path: export_plan(
                source.config, tokenizer_dir, method.recipe, chat_template=template,
                has_importance=_has_importance(request),
            )
            for path, method in paths.items()
        }  # fmt: skip
        tower = _mmproj_plan(model, request)
        towers = {} if tower is None else {_mmproj_path(model, request): tower}
        require_space({path: planned.num_bytes for path, planned in (static | towers).items()})
        moments = _measured(source, request, dynamic=any(method.is_dynamic for method in methods))
        importance = _importance(source, request, moments)
        outputs: dict[Any, Recipe] = {
            path: _dynamic(source, static[path], request, moments) if method.is_dynamic else method.recipe
            for path, method in paths.items()
        }
        total = sum(next(iter(plans.values())).num_weights for plans in (static, towers) if plans)
        with tqdm(total=total, desc="writing GGUF", unit=" weights", unit_scale=True, delay=1) as bar:
            export_gguf(
                outputs, config=source.config, tokenizer_dir=tokenizer_dir, tensors=merged_tensors(plan, model.device),
                mmproj=dict.fromkeys(towers, request.mmproj_type), importance=importance, chat_template=template,
                image_processor=image_settings(model, request.tokenizer) if towers else None, name=base_name(model),
                progress=lambda done, _, name: bar.update(done - bar.n),
            )  # fmt: skip
    for path, recipe in outputs.items():
        if isinstance(recipe, ExplicitRecipe):
            recipe.save(path.with_suffix(".recipe.json"))
    modelfile = _save_modelfile(processor_of(model, request.tokenizer), next(iter(outputs)), next(iter(towers), None))
    beside = "" if modelfile is None else f"; ollama create {base_name(model).lower()} -f {modelfile}"
    notice(f"fastllm: {len(outputs) + len(towers)} GGUF files are in {request.folder}, written and read back{beside}")
    full_precision = any(method.recipe.name in ("f32", "f16", "bf16") for method in methods)
    return _written(request, [*outputs, *towers], modelfile, full_precision=full_precision, is_vlm=bool(towers))


@dataclass(frozen=True)
class _Source:
    """The model that is exported: as it is in memory, and as it will be merged with its `config`."""

    model: Any
    tokenizer: Any
    plan: MergePlan
    config: Mapping[str, Any]

    @functools.cached_property
    def _layout(self) -> Layout:
        architecture, config = architecture_of(self.config)
        return architecture.layout(config)

    def targets(self, weight_name: str) -> list[Target]:
        """The GGUF tensors that a weight becomes; a tied head is the embedding."""
        canonical = canonical_name(weight_name)
        if canonical == "lm_head.weight" and canonical not in self._layout.targets:
            canonical = "model.embed_tokens.weight"
        return self._layout.targets.get(canonical, [])

    def num_experts(self, target: Target) -> int:
        """Of the GGUF tensor that a checkpoint's tensor is one expert of; 1 where it is a whole tensor."""
        return 1 if target.expert is None else self._layout.shapes[target.name][0]

    def of_columns(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values for the columns of weights, by GGUF tensor."""
        return {target.name: value for name, value in values.items() for target in self.targets(name)}

    def of_rows(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values for the rows of weights, by GGUF tensor, in the order that its rows have there."""
        return {target.name: target.change(value) for name, value in values.items() for target in self.targets(name)}


def merged_tensors(plan: MergePlan, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of each tensor of the merged model, adapted ones in fp32 and on `device`, one in memory at a
    time. The disk reads the next ones meanwhile."""
    weights = list(plan.weights.values())
    for i, weight in enumerate(weights):
        for upcoming in weights[i + _AHEAD : i + _AHEAD + 1]:
            upcoming.prefetch()
        if weight.edits:
            yield weight.name, torch.cat([finite_block(weight, block) for _, block in weight.merged(device=device)])
        else:
            yield weight.name, weight.stored().to(device)


def base_name(model: Any) -> str:
    """The base model's name as a part of a file's name."""
    name = (getattr(model, "name_or_path", "") or model.config.model_type).rstrip("/\\").replace("\\", "/")
    return re.sub(r"[^\w.-]+", "-", name.split("/")[-1]).strip(".-") or "model"


def _methods(request: GgufRequest, model_dtype: str) -> list[_Method]:
    """The quantizations asked for, each once. Raises for one that does not exist."""
    given = request.quantization_method
    names = [_DEFAULT] if given is None else [given] if isinstance(given, str | ExplicitRecipe) else given
    if not isinstance(names, list | tuple) or not names:
        raise ArgumentError(
            f"got {given!r}", where="quantization_method", fix='quantization_method="q4_k_m", or a list of such names'
        )
    if request.target_bpw is not None or request.max_size is not None:
        names = [_DYNAMIC_DEFAULT if name == _DEFAULT else name for name in names]
    methods = {method.label: method for method in (_method(name, model_dtype) for name in names)}
    sized = request.target_bpw is not None or request.max_size is not None
    if sized and not (len(methods) == 1 and next(iter(methods.values())).is_dynamic):
        raise ArgumentError(
            "a size is reached by dynamic quantization, and by one method at a time",
            where="target_bpw, max_size", fix=f'quantization_method="{_DYNAMIC_DEFAULT}"',
        )  # fmt: skip
    return list(methods.values())


def _method(name: Any, model_dtype: str) -> _Method:
    if isinstance(name, ExplicitRecipe):
        return _Method(name)
    if not isinstance(name, str):
        raise ArgumentError(f"{name!r} is not a name", where="quantization_method", fix='for example "q4_k_m"')
    if name.endswith(".json"):
        return _Method(ExplicitRecipe.load(name))
    base = dynamic_base(name)
    if base is not None:
        return _Method(static_mix(base), is_dynamic=True)
    return _Method(static_mix(name, model_dtype.removeprefix("torch.")))


def _has_importance(request: GgufRequest) -> bool:
    return request.imatrix_file is not None or request.calibration is not None


def _measured(source: _Source, request: GgufRequest, *, dynamic: bool) -> Moments:
    """What the calibration data shows, where there is some."""
    if request.calibration is None:
        return Moments()
    return calibrate(source.model, source.tokenizer, request.calibration, gradients=dynamic)


def _importance(source: _Source, request: GgufRequest, moments: Moments) -> dict[str, torch.Tensor] | None:
    """E[x^2] by GGUF name: from a file, or measured."""
    given = request.imatrix_file
    if given is None:
        return source.of_columns(moments.inputs) or None
    if isinstance(given, bool):
        raise UnsupportedError(
            "importance matrices are not downloaded", where="imatrix_file",
            fix="pass the path of an imatrix file, or calibration_dataset=dataset to measure one",
        )  # fmt: skip
    return load_imatrix(given)


def _dynamic(source: _Source, static: ExportPlan, request: GgufRequest, moments: Moments) -> ExplicitRecipe:
    """The recipe for this model within the size asked for, the static mix's own where none is."""
    kinds = candidates(static)
    divergences: dict[str, Counter[str]] = {}
    columns, rows = source.of_columns(moments.inputs), source.of_rows(moments.gradients)
    scales = {name: values[..., 0] for name, values in source.of_rows(moments.scales).items()}
    embeddings = source.of_rows(moments.embeddings)
    with tqdm(total=static.num_weights, desc="measuring types", unit=" weights", unit_scale=True, delay=1) as bar:
        for name, tensor in merged_tensors(source.plan, source.model.device):
            for target in source.targets(name):
                measured = target.name in columns, target.name in embeddings  # a tied embedding is the head too
                if target.name not in kinds or not any(measured):
                    continue
                weight, allowed = target.change(tensor), kinds[target.name]
                costs = divergences.setdefault(target.name, Counter())  # to which each expert adds its own
                if measured[0]:
                    costs.update(_divergences(source, target, weight, allowed, columns, rows, scales))
                if measured[1]:
                    costs.update(embedding_divergences(weight, allowed, embeddings[target.name]))
            bar.update(tensor.numel())
    left = [name for name in kinds if name not in divergences]
    if left:
        notice(f"fastllm: {len(left)} tensors keep the type of {static.quantization}: {', '.join(left[:3])}")
    notes = {"calibration_tokens": moments.num_tokens, "base_model": base_name(source.model)}
    return dynamic_recipe(
        static, divergences, bits_per_weight=request.target_bpw, max_size=request.max_size, notes=notes
    )


def _divergences(
    source: _Source,
    target: Target,
    weight: torch.Tensor,
    kinds: list[TensorType],
    columns: Mapping[str, torch.Tensor],
    rows: Mapping[str, torch.Tensor],
    scales: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """What each type would cost a whole tensor, or one expert of it."""
    x2, g2, scale = columns[target.name], rows[target.name], scales[target.name]
    if target.expert is not None:
        x2, g2, scale = x2[target.expert], g2[target.expert], scale[target.expert]
    sampled_rows = max(1, SAMPLED_ROWS // source.num_experts(target))
    return expected_divergences(
        weight, kinds, importance=x2, output_importance=g2, scale_importance=scale, sampled_rows=sampled_rows
    )


def _save_lora(model: Any, request: GgufRequest) -> Path:
    """The one active adapter as a file that llama.cpp adds to the base model."""
    from peft.utils import get_peft_model_state_dict

    active = read_adapters(model).active
    if len(active) != 1:
        raise UnsupportedError(
            f"{len(active)} adapters are active, and a LoRA GGUF file holds one", where='save_method="lora"',
            fix='model.set_adapter("default")',
        )  # fmt: skip
    kind = _lora_type(request)
    path = request.folder / f"{base_name(model)}-lora-{kind}.gguf"
    tensors = get_peft_model_state_dict(model, adapter_name=active[0])
    write_lora_gguf(
        path, config=model.config.to_dict(), adapter_config=model.peft_config[active[0]].to_dict(),
        tensors=tensors.items(), quantization=kind, name=path.stem,
    )  # fmt: skip
    notice(f"fastllm: saved {path}; run it with llama-cli -m base.gguf --lora {path.name}")
    return path


def _lora_type(request: GgufRequest) -> str:
    given = request.quantization_method or _DEFAULT
    kind = _LORA_TYPES.get(str(given).lower())
    if kind is None:
        raise UnsupportedError(
            f"an adapter is not stored as {given!r} {nearest(str(given), _LORA_TYPES)}".rstrip(),
            where="quantization_method", fix=f"one of {', '.join(_LORA_TYPES)}",
        )  # fmt: skip
    return kind


def _save_modelfile(tokenizer: Any, path: Path, mmproj: Path | None) -> Path | None:
    """Ollama's Modelfile beside the first GGUF file; None, told with the reason, where the template has no Go form."""
    try:
        text = modelfile_of(tokenizer, f"./{path.name}", None if mmproj is None else f"./{mmproj.name}")
    except FastllmError as error:
        notice(f"fastllm: no Modelfile is written, Ollama takes the chat template of the GGUF file itself: {error}")
        return None
    target = path.with_name("Modelfile")
    encoded = text.encode()
    with atomic_file(target, len(encoded)) as file:
        file.write_at(0, encoded)
    return target


def _written(
    request: GgufRequest, files: list[Path], modelfile: Path | None, *, full_precision: bool, is_vlm: bool = False
) -> dict:
    return {
        "save_directory": str(request.folder),
        "gguf_directory": str(request.folder),
        "gguf_files": [str(path) for path in files],
        "modelfile_location": None if modelfile is None else str(modelfile),
        "want_full_precision": full_precision,
        "is_vlm": is_vlm,
        "fix_bos_token": False,
    }


def _mmproj_plan(model: Any, request: GgufRequest) -> ExportPlan | None:
    """The plan of the mmproj file; None for a model without a vision tower."""
    config = model.config.to_dict()
    if config.get("vision_config") is None:
        return None
    return mmproj_plan(config, image_settings(model, request.tokenizer), request.mmproj_type, name=base_name(model))


def _mmproj_path(model: Any, request: GgufRequest) -> Path:
    return request.folder / f"mmproj-{base_name(model)}-{request.mmproj_type.upper()}.gguf"
