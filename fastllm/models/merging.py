"""Saving a trained model: adapters merged into a full model folder, or the adapters alone.

A merge runs from file to file: plan (`merge_plan`), write tensor by tensor into a staging folder (`staged_folder`),
read back and check (`merge_checks`), and only then put in place.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .._errors import ArgumentError, ModelError, TokenizerError, UnsupportedError, nearest
from .._notices import notice, warn
from .adapted_weights import read_adapters
from .adapter_folder import save_adapters
from .calibration import CalibrationData
from .checkpoints import INDEX_FILE, SINGLE_FILE, TensorEntry, encode_index, parse_size, safetensors_writer
from .dynamic_4bit import RECIPE_FILE, FourBitRecipe, FourBitRequest, measured_recipe
from .merge_checks import Divergence, check_files, check_logits
from .merge_plan import MergePlan, Weight, keep_16bit, plan_merge
from .model_methods import TOKENIZER
from .modes import release_for_saving
from .patch import unwrapped
from .staged_folder import staged_folder

_METHODS = {
    "merged_16bit": "merged_16bit",
    "merged_4bit": "merged_4bit",
    "merged_4bit_forced": "merged_4bit",
    "forced_merged_4bit": "merged_4bit",
    "dynamic_4bit": "dynamic_4bit",
    "lora": "lora",
}
# Formats that Unsloth writes and this version does not.
_COMPRESSED = (
    "fp8", "fp8_dynamic", "dynamic_fp8", "w8a8_fp8", "fp8_static", "fp8_block", "int8", "w8a8", "w8a8_int8", "w8a16",
    "int8_weight", "w4a16", "int4", "int4_weight", "w4a16_asym", "w4a8", "w4afp8", "mxfp8", "mxfp4", "w4a4_mxfp4",
    "mxfp4a16", "nvfp4", "w4a4_nvfp4", "nvfp4a16",
)  # fmt: skip
_TORCHAO = ("torchao_fp8", "torchao_int8", "portable_fp8", "portable_int8")


@dataclass(frozen=True)
class SaveRequest:
    """The arguments of `save_pretrained_merged` that decide what is written. `max_shard_size` None keeps the files of
    the base checkpoint; what follows it is for "dynamic_4bit"."""

    folder: Path
    tokenizer: Any = None
    save_method: str = "merged_16bit"
    max_shard_size: int | str | None = None
    calibration: CalibrationData | None = None
    target_bpw: float | None = None
    max_size: int | str | None = None


def parse_method(save_method: Any) -> str:
    """The save method meant by a name in any case, with dashes or blanks, or by the path of a dynamic model's recipe.
    Raises for an unknown or unserved one."""
    if _is_recipe(save_method):
        return "dynamic_4bit"
    name = str(save_method).lower().replace("-", "_").replace(" ", "_")
    if name in _METHODS:
        return _METHODS[name]
    if name in _COMPRESSED or name in _TORCHAO:
        kind = "torchao" if name in _TORCHAO else "compressed-tensors"
        raise UnsupportedError(
            f"{save_method!r} asks for {kind} quantization, which is not part of this version",
            where="save_method",
            fix='save_method="merged_16bit", then quantize the folder with llm-compressor or torchao',
        )
    raise ArgumentError(
        f"there is no method {save_method!r} {nearest(name, [*_METHODS, *_COMPRESSED, *_TORCHAO])}".rstrip(),
        where="save_method",
        fix=f"use one of {', '.join(_METHODS)}",
    )


def check_request(request: SaveRequest) -> str:
    """The save method of a request. Raises for what `save_merged` would refuse without having seen any weight."""
    method = parse_method(request.save_method)
    sized = [name for name in ("target_bpw", "max_size") if getattr(request, name) is not None]
    followed = _is_recipe(request.save_method)
    if sized and (method != "dynamic_4bit" or followed):
        raise ArgumentError(
            "the recipe has decided the size" if followed else f"{method} has one size", where=", ".join(sized),
            fix='save_method="dynamic_4bit"',
        )  # fmt: skip
    if method == "dynamic_4bit" and not followed and request.calibration is None:
        raise ArgumentError(
            "dynamic quantization measures on data which layers need 16 bits, and there is none",
            where="save_method", fix="calibration_dataset=dataset, for example the one that was trained on",
        )  # fmt: skip
    if request.calibration is not None and (method != "dynamic_4bit" or followed):
        notice(
            f"fastllm: calibration_dataset has no effect: {request.save_method} needs no calibration",
            once="merged calibration",
        )
    return method


def _is_recipe(save_method: Any) -> bool:
    return isinstance(save_method, str | os.PathLike) and os.fspath(save_method).endswith(".json")


def save_merged(model: Any, request: SaveRequest) -> list[Path]:
    """Save a model and its active adapters as `request` says, and check what was written. Returns the files.

    Raises:
        ArgumentError: a method or shard size that does not exist, a folder that would overwrite the base checkpoint.
        UnsupportedError: a method that is not served; an adapter that is not a linear change of its weights.
        ModelError: adapters that are switched off, do not fit the checkpoint, or hold values that are not finite; a
            saved model that differs from the trained one.
        SaveError: the folder can't be written, or the disk is too small.
    """
    method = check_request(request)
    model = unwrapped(model)
    tokenizer = request.tokenizer if request.tokenizer is not None else getattr(model, TOKENIZER, None)
    _require_own_folder(model, request.folder, "config.json" if method == "lora" else "adapter_config.json")
    if method == "lora":
        with staged_folder(request.folder, 0) as staging:
            saved = save_adapters(model, read_adapters(model), staging)
            _save_tokenizer(tokenizer, staging)
            files = _files_of(staging)
        notice(f"fastllm: saved {saved} to {request.folder}")
        return [request.folder / file for file in files]
    release_for_saving(model)
    max_bytes = None if request.max_shard_size is None else parse_size(request.max_shard_size)
    dynamic = method == "dynamic_4bit"
    plan = plan_merge(
        model, max_shard_bytes=max_bytes, four_bit=dynamic or method == "merged_4bit", every_layer=dynamic
    )
    tell_source(model, plan)
    recipe = _dynamic(model, tokenizer, plan, request, max_bytes) if dynamic else None
    if method == "merged_4bit":
        warn(
            "merged_4bit rounds the merged weights to 4 bits once more, which costs accuracy that training had"
            ' compensated for; "dynamic_4bit" costs less, "merged_16bit", or "lora" on the 4-bit base, nothing'
        )
    with staged_folder(request.folder, plan.num_bytes) as staging:
        checksums = write_weights(plan, staging)
        _save_configs(model, plan, staging)
        _save_tokenizer(tokenizer, staging)
        if recipe is not None:
            recipe.save(staging / RECIPE_FILE)
        check_files(plan, staging, checksums)
        found = check_logits(model, plan, staging, tokenizer)
        files = _files_of(staging)
    notice(_summary(plan, request.folder, found))
    return [request.folder / file for file in files]


def _dynamic(
    model: Any, tokenizer: Any, plan: MergePlan, request: SaveRequest, max_shard_bytes: int | None
) -> FourBitRecipe:
    """Settle which layers of `plan` stay in 16 bits: those of a given recipe, or measured ones."""
    if request.calibration is None or _is_recipe(request.save_method):
        recipe = FourBitRecipe.load(request.save_method)
    else:
        if tokenizer is None:
            raise TokenizerError(
                "calibration data is text, and no tokenizer was given", where="save_pretrained_merged",
                fix='model.save_pretrained_merged("folder", tokenizer, ...)',
            )  # fmt: skip
        measure = FourBitRequest(request.calibration, request.target_bpw, request.max_size)
        recipe = measured_recipe(model, tokenizer, plan, measure)
    total = len(plan.encoder.modules) if plan.encoder is not None else 0
    keep_16bit(plan, recipe.kept, max_shard_bytes)
    listed = f"{', '.join(recipe.kept[:4])}{', ...' if len(recipe.kept) > 4 else ''}" or "none"
    notice(f"fastllm: {len(recipe.kept)} of {total} linear layers stay in {plan.dtype}: {listed}")
    return recipe


def _files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def write_weights(plan: MergePlan, folder: Path) -> dict[str, int]:
    """Write every file of the plan, one tensor in memory at a time. Returns the CRC-32 of each stored tensor."""
    checksums: dict[str, int] = {}
    with tqdm(total=plan.num_bytes, desc="saving", unit="B", unit_scale=True, delay=1) as progress:
        for file, names in plan.files.items():
            entries = [entry for name in names for entry in plan.outputs(plan.weights[name])]
            with safetensors_writer(folder / file, entries) as writer:
                for name in names:
                    for stored_name, block in _encoded(plan, plan.weights[name]):
                        progress.update(writer.write(stored_name, block))
            checksums |= writer.checksums
    if set(plan.files) != {SINGLE_FILE}:
        entries_of = {file: _entries(plan, names) for file, names in plan.files.items()}
        (folder / INDEX_FILE).write_text(encode_index(entries_of), "utf-8")
    return checksums


def _entries(plan: MergePlan, names: list[str]) -> list[TensorEntry]:
    return [entry for name in names for entry in plan.outputs(plan.weights[name])]


def _encoded(plan: MergePlan, weight: Weight) -> Iterator[tuple[str, torch.Tensor]]:
    """(stored name, block) in the order of the bytes: copied, or merged in fp32 and rounded once."""
    if plan.encoder is not None and plan.encoder.is_quantized(weight.name):
        whole = torch.cat([finite_block(weight, block) for _, block in weight.merged()])
        yield from plan.encoder.encode(weight.name, whole.float()).items()
    elif not weight.edits:
        yield weight.name, weight.data()
    else:
        for _, block in weight.merged():
            yield weight.name, finite_block(weight, block.to(weight.entry.torch_dtype))


def finite_block(weight: Weight, block: torch.Tensor) -> torch.Tensor:
    """`block` of a merged weight; raises `ModelError` where it holds a NaN or an infinity."""
    if not bool(torch.isfinite(block).all()):
        raise ModelError(
            f"merged, it holds values that {block.dtype} can't hold or that are not numbers",
            where=weight.name,
            fix="the adapter is broken: go back to a checkpoint from before the loss became NaN",
        )
    return block


def _require_own_folder(model: Any, folder: Path, conflicting: str) -> None:
    """A folder that is the base checkpoint, or holds what transformers would load instead, is refused."""
    base = Path(getattr(model, "name_or_path", "") or "")
    if folder.exists() and str(base) not in ("", ".") and base.is_dir() and folder.samefile(base):
        raise ArgumentError(
            "this is the base checkpoint that the model was loaded from, and saving would overwrite it",
            where=str(folder),
            fix=f'choose another folder, for example "{folder}-merged"',
        )
    if (folder / conflicting).is_file():
        theirs, ours = ("a full model", "an adapter") if conflicting == "config.json" else ("an adapter", "a model")
        raise ArgumentError(
            f"it holds {theirs} ({conflicting}); with {ours} beside it, transformers would load a mixture of both",
            where=str(folder),
            fix=f'choose another folder, for example "{folder}-{"lora" if ours == "an adapter" else "merged"}"',
        )


def merged_config(model: Any, plan: MergePlan) -> Any:
    """The base's config with what the merge changes."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if plan.encoder is not None:
        config.quantization_config = plan.encoder.config
    if plan.untied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    config.dtype = plan.dtype
    config.architectures = [type(plan.twin).__name__]
    config.use_cache = True  # training switches it off
    return config


def _save_configs(model: Any, plan: MergePlan, folder: Path) -> None:
    """config.json, and generation_config.json as the base has it."""
    merged_config(model, plan).save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not its save_pretrained, which refuses what the base itself came with, such as a temperature without sampling.
        (folder / "generation_config.json").write_text(generation.to_json_string(), "utf-8")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer with its chat template, padding left as generation needs it."""
    if tokenizer is None:
        warn(f"no tokenizer is saved, since none was given: tokenizer.save_pretrained({str(folder.parent)!r}) adds it")
        return
    with _padding_left(getattr(tokenizer, "tokenizer", tokenizer)):
        tokenizer.save_pretrained(folder)


@contextmanager
def _padding_left(tokenizer: Any) -> Iterator[None]:
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def tell_source(model: Any, plan: MergePlan) -> None:
    """Tell what is not as usual about a merge: its source, its precision, weights and adapters left apart."""
    quantized = any(tensor.is_quantized for tensor in plan.adapters.loaded.values())
    if plan.base is None:
        from_what = "the loaded weights, dequantised" if quantized else "the loaded weights"
        notice(f"fastllm: merging into {from_what}, since {plan.reason}")
    if plan.untied:
        notice(f"fastllm: {', '.join(plan.untied)} is saved on its own: training has parted it from the embedding")
    if plan.adapters.idle:
        notice(f"fastllm: adapters that are not active are not merged: {', '.join(plan.adapters.idle)}")


def _summary(plan: MergePlan, folder: Path, found: Divergence | None) -> str:
    edited = len(plan.edited)
    copied = len(plan.weights) - edited
    adapters = f" from {', '.join(plan.adapters.active)}" if plan.adapters.active else ""
    kind = "4-bit" if plan.encoder is not None else str(plan.dtype).removeprefix("torch.")
    checked = "every tensor" if found is None else f"every tensor, and {found}"
    return (
        f"fastllm: saved {plan.num_bytes / 1e9:.2f} GB in {kind} to {folder}: {edited} tensors changed{adapters},"
        f" {copied} as they were\n  read back and checked: {checked}"
    )
