"""What a merged model consists of, decided before anything is written: every tensor, where its stored values come
from, what training changed in it, and the file it goes to.

The base checkpoint's own files are the source wherever they are at hand in 16 bits; each tensor without an edit is then
a copy of its bytes. Otherwise the loaded weights are, dequantised where they are quantized.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from .._errors import ModelError, UnsupportedError
from .._notices import notice
from .adapted_weights import AdaptedWeights, LoadedTensor, read_adapters
from .checkpoints import INDEX_FILE, SINGLE_FILE, Checkpoint, TensorEntry, dtype_name, read_weight_map, shard
from .nf4_encoder import Nf4Encoder
from .weight_edits import Edit, Part
from .weight_names import NameMap, empty_twin, map_names, stored_names, tied_weights

# Values of a block of rows: 64 MiB in fp32.
_BLOCK_VALUES = 2**24
_SHARD_BYTES = 5_000_000_000


class WeightSource(Protocol):
    """Stored tensors by name: a `Checkpoint`, or the loaded weights under the names they are stored by."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]: ...

    def data(self, name: str) -> torch.Tensor: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def prefetch(self, name: str) -> None: ...


class LoadedWeights:
    """The weights in memory as a checkpoint in `dtype` would hold them."""

    def __init__(self, twin: Any, weights: AdaptedWeights, dtype: torch.dtype) -> None:
        shapes = stored_names(twin)
        self._parts = map_names(twin, shapes).parts
        self._loaded = weights.loaded
        lost = [name for name in shapes if name not in self._parts]
        if lost:
            raise UnsupportedError(
                f"transformers stores {lost[0]!r} in a way that can't be made of the loaded weights",
                where=type(twin).__name__,
                fix="save where the base checkpoint is at hand in 16 bits",
            )
        self.entries = {
            name: TensorEntry(name, dtype_name(self._dtype_of(name, dtype)), tuple(shape))
            for name, shape in shapes.items()
        }

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        loaded = self._loaded[self._parts[name].name]
        return dtype if loaded.is_quantized or loaded.raw.is_floating_point() else loaded.raw.dtype

    def tensor(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        value = self._loaded[part.name].value(part)
        # Quantized values keep their fp32 for the merge, which rounds.
        return value if value.dtype == torch.float32 else value.to(self.entries[name].torch_dtype)

    def data(self, name: str) -> torch.Tensor:
        value = self.tensor(name).to(self.entries[name].torch_dtype)
        return value.contiguous().flatten().view(torch.uint8)

    def prefetch(self, name: str) -> None:
        """They are in memory."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the merged model. `grown` gives the rows past the stored ones where a vocabulary was resized."""

    entry: TensorEntry
    source: WeightSource
    stored_as: str
    edits: tuple[Edit, ...] = ()
    grown: LoadedTensor | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    def prefetch(self) -> None:
        """Tell that the stored values will be needed soon."""
        self.source.prefetch(self.stored_as)

    def stored(self) -> torch.Tensor:
        """The values before any edit: [rows, ...], a view of the file where there is one."""
        tensor = torch.atleast_1d(self.source.tensor(self.stored_as))
        if self.grown is None:
            return tensor
        rows = self.entry.shape[0]
        added = self.grown.value(Part(self.name, start=tensor.shape[0]))
        return torch.cat((tensor[:rows], added.to(tensor.dtype)))

    def data(self) -> torch.Tensor:
        """The bytes of a tensor without edits: uint8 [num_bytes]."""
        if self.grown is None:
            return self.source.data(self.stored_as)
        return self.stored().flatten().view(torch.uint8)

    def merged(self, device: torch.device | str = "cpu") -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, block of rows) with all edits applied on `device`, unrounded, in fp32 (fp64 for fp64)."""
        stored = self.stored()
        dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
        rows = max(1, _BLOCK_VALUES // max(1, stored[:1].numel()))
        for start in range(0, stored.shape[0], rows):
            yield start, self.merge_rows(stored[start : start + rows].to(device, dtype), start)

    def merge_rows(self, stored: torch.Tensor, start: int) -> torch.Tensor:
        """The rows `stored`, which begin at `start`, with all edits applied in their dtype."""
        merged = stored
        for edit in self.edits:
            merged = edit.apply(stored, merged, start)
        return merged


@dataclass
class MergePlan:
    """`weights` by name, `files` with the names in each. `base` is the folder that tensors are copied from, None where
    they come from memory for `reason`. `untied` weights were tied in the base and are not any more; `added` ones are
    not in the base at all. `restacks` is True where transformers builds loaded tensors of several stored ones. With an
    `encoder`, linear layers are stored in 4 bits."""

    twin: Any
    adapters: AdaptedWeights
    base: Path | None
    reason: str
    dtype: torch.dtype
    weights: dict[str, Weight] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    restacks: bool = False
    encoder: Nf4Encoder | None = None

    def outputs(self, weight: Weight) -> list[TensorEntry]:
        """What a weight is stored as: one tensor, or the several of a quantized one."""
        return [weight.entry] if self.encoder is None else self.encoder.entries(weight.entry)

    @property
    def edited(self) -> list[Weight]:
        return [weight for weight in self.weights.values() if weight.edits]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for weight in self.weights.values() for entry in self.outputs(weight))


def plan_merge(
    model: Any, *, max_shard_bytes: int | None = None, four_bit: bool = False, every_layer: bool = False
) -> MergePlan:
    """The merge of a transformers model, with or without PEFT's layers in it, and its active adapters.

    `four_bit` stores the linear layers as bitsandbytes does: those that a loaded 4-bit model has in 4 bits, or with
    `every_layer` all that can be.

    Raises:
        ModelError: adapters that are switched off or merged in place already, an adapted weight that the checkpoint
            does not hold in its shape.
        UnsupportedError: an adapter, or a way of storing weights, that can't be merged tensor by tensor.
    """
    adapters = read_adapters(model)
    _require_ready(model, adapters)
    twin = empty_twin(model)
    base = find_base(model)
    plan = MergePlan(
        twin, adapters, None if isinstance(base, str) else base, base if isinstance(base, str) else "",
        _stored_dtype(model),
    )  # fmt: skip
    source: WeightSource
    source = LoadedWeights(twin, adapters, plan.dtype) if plan.base is None else Checkpoint(plan.base)
    names = map_names(twin, {name: entry.shape for name, entry in source.entries.items()})
    plan.restacks = bool(names.unknown) or any(part.expert is not None for part in names.parts.values())
    for entry in source.entries.values():
        plan.weights[entry.name] = _planned(entry, names.parts.get(entry.name), source, adapters)
    _add_what_is_not_stored(plan, names, source)
    if four_bit:
        plan.encoder = Nf4Encoder(model, twin, names, plan.dtype, every_layer=every_layer)
    plan.files = _files(plan, source, max_shard_bytes)
    return plan


def keep_16bit(plan: MergePlan, modules: Collection[str], max_shard_bytes: int | None = None) -> None:
    """Leave these of the 4-bit layers of `plan` as they are. Raises `ArgumentError` for one that is not there."""
    if plan.encoder is None:
        raise ValueError("the plan stores nothing in 4 bits")
    plan.encoder.keep(modules)
    plan.files = _sharded(plan, max_shard_bytes)


def find_base(model: Any) -> Path | str:
    """The folder of the 16-bit base checkpoint, or why there is none at hand. Never downloads."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return "the model does not say which checkpoint it was loaded from"
    config = _base_config(model)
    if config is None:
        return f"{name} is neither a folder nor in the local cache"
    quantization = _read_json(config).get("quantization_config")
    if quantization is not None:
        return f"{name} is itself quantized ({quantization.get('quant_method', 'unknown method')})"
    folder = config.parent
    if (folder / SINGLE_FILE).is_file():
        return folder
    if not (folder / INDEX_FILE).is_file():
        return f"{name} holds no safetensors"
    missing = {file for file in read_weight_map(folder / INDEX_FILE).values() if not (folder / file).is_file()}
    return f"{len(missing)} of the files of {name} are not at hand" if missing else folder


def _base_config(model: Any) -> Path | None:
    """`config.json` of the checkpoint that the model was loaded from: in its folder, or the cache at its revision."""
    from transformers.utils.hub import cached_file

    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return None
    try:
        found = cached_file(
            name, "config.json", revision=getattr(model.config, "_commit_hash", None), local_files_only=True,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except OSError:  # a folder that is not there any more, which is no repository's name either
        return None
    return None if found is None else Path(found)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"it can't be read ({error})", where=str(path)) from error
    return content if isinstance(content, dict) else {}


def _stored_dtype(model: Any) -> torch.dtype:
    """The dtype of the merged model: that of the base checkpoint's config, which loading may have changed in memory."""
    config = _base_config(model)
    written = _read_json(config) if config is not None else {}
    dtype = getattr(torch, str(written.get("dtype") or written.get("torch_dtype") or ""), None)
    return dtype if isinstance(dtype, torch.dtype) else model.dtype


def _require_ready(model: Any, adapters: AdaptedWeights) -> None:
    if adapters.in_place:
        raise ModelError(
            f"adapters are merged into the loaded weights already ({len(adapters.in_place)} layers)",
            where=adapters.in_place[0],
            fix="model.unmerge_adapter()",
        )
    if adapters.switched_off:
        raise ModelError(
            f"adapters are switched off ({len(adapters.switched_off)} layers), and the saved model would lack them",
            where=adapters.switched_off[0],
            fix="model.enable_adapter_layers()",
        )
    if getattr(model, "peft_config", None) and not adapters.active:
        raise ModelError(
            "none of its adapters is active, and the saved model would be the base model",
            where=", ".join(adapters.idle),
            fix=f'model.set_adapter("{adapters.idle[0]}")',
        )


def _planned(entry: TensorEntry, part: Part | None, source: WeightSource, adapters: AdaptedWeights) -> Weight:
    """A stored tensor with the edits of the loaded one it belongs to."""
    loaded = adapters.loaded.get(part.name) if part is not None else None
    if part is None or loaded is None:
        return Weight(entry, source, entry.name)
    edits = tuple(edit.part(part) for edit in adapters.edits.get(part.name, ()))
    if loaded.is_quantized:
        return Weight(entry, source, entry.name, edits)
    shape = tuple(part.of(loaded.raw).shape) or (1,)
    if shape == (entry.shape or (1,)):
        return Weight(entry, source, entry.name, edits)
    if shape[1:] != entry.shape[1:] or part.expert is not None:
        raise ModelError(
            f"it is {list(shape)} in the model and {list(entry.shape)} in the checkpoint",
            where=entry.name,
            fix="load the model from the checkpoint that it was trained on",
        )
    return Weight(TensorEntry(entry.name, entry.dtype, shape), source, entry.name, edits, grown=loaded)


def _add_what_is_not_stored(plan: MergePlan, names: NameMap, source: WeightSource) -> None:
    """Weights of the model that the checkpoint has no tensor for: tied ones that training has parted, and new ones."""
    adapters, tied = plan.adapters, tied_weights(plan.twin)
    covered = {part.name: stored for stored, part in names.parts.items()}
    unknown = [name for name in names.unknown if adapters.edits.get(name)]
    if unknown:
        raise UnsupportedError(
            names.unknown[unknown[0]], where=unknown[0], fix="train without an adapter on it, or save with PEFT"
        )
    for name, twin_tensor in plan.twin.state_dict().items():
        loaded = adapters.loaded.get(name)
        if name in names.unknown or loaded is None:
            continue
        partner = tied.get(name)
        if partner in covered:
            if _identity(adapters, name) == _identity(adapters, partner):
                continue
            plan.untied.append(name)
        if name in covered:
            continue
        edits = tuple(adapters.edits.get(name, ()))
        if partner in covered:
            like = plan.weights[covered[partner]]
            entry = TensorEntry(name, like.entry.dtype, like.entry.shape)
            plan.weights[name] = Weight(entry, source, like.stored_as, edits, like.grown)
        else:
            entry = TensorEntry(name, dtype_name(plan.dtype), tuple(twin_tensor.shape))
            plan.weights[name] = Weight(entry, _InMemory(loaded, entry), name, edits)
            plan.added.append(name)
    if plan.added:
        notice(
            f"fastllm: {len(plan.added)} weights of the model are not in its base checkpoint and are saved from memory:"
            f" {', '.join(plan.added[:4])}{', ...' if len(plan.added) > 4 else ''}"
        )


class _InMemory:
    """One loaded tensor as a source of its own."""

    def __init__(self, loaded: LoadedTensor, entry: TensorEntry) -> None:
        self._loaded, self.entries = loaded, {entry.name: entry}

    def tensor(self, name: str) -> torch.Tensor:
        return self._loaded.value(Part(name))

    def data(self, name: str) -> torch.Tensor:
        return self.tensor(name).to(self.entries[name].torch_dtype).contiguous().flatten().view(torch.uint8)

    def prefetch(self, name: str) -> None:
        """It is in memory."""


def _identity(adapters: AdaptedWeights, name: str) -> list[tuple]:
    return [edit.identity for edit in adapters.edits.get(name, ())]


def _files(plan: MergePlan, source: WeightSource, max_shard_bytes: int | None) -> dict[str, list[str]]:
    """The base's own files, or new ones of a size that was asked for. What the base lacks goes to the last one."""
    if isinstance(source, Checkpoint) and plan.encoder is None and max_shard_bytes is None:
        files = {file: list(names) for file, names in source.layout.items()}
        listed = {name for names in files.values() for name in names}
        files[next(reversed(files))] += [name for name in plan.weights if name not in listed]
        return files
    return _sharded(plan, max_shard_bytes)


def _sharded(plan: MergePlan, max_shard_bytes: int | None) -> dict[str, list[str]]:
    sizes = {name: sum(entry.num_bytes for entry in plan.outputs(weight)) for name, weight in plan.weights.items()}
    return shard(sizes, max_shard_bytes or _SHARD_BYTES)
