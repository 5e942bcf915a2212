"""Adapters in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from .._errors import ModelError
from .adapted_weights import AdaptedWeights
from .checkpoints import SafetensorsFile, TensorEntry, dtype_name, safetensors_writer

_WEIGHTS_FILE = "adapter_model.safetensors"


def save_adapters(model: Any, weights: AdaptedWeights, folder: Path) -> str:
    """Write the active adapters of a transformers model that PEFT has worked on, and read them back.

    One adapter goes to `folder` itself; of several, "default" does and the others to subfolders of their names, which
    is where PEFT looks for them. Returns what was saved, in words.
    """
    if not weights.active:
        raise ModelError(
            "the model has no active adapter to save", where="save_method='lora'", fix='save_method="merged_16bit"'
        )
    alone = len(weights.active) == 1
    for adapter in weights.active:
        if adapter != Path(adapter).name or adapter.startswith("."):
            raise ModelError("it can't be the name of a folder", where=f"adapter {adapter!r}", fix="rename the adapter")
        place = folder if alone or adapter == "default" else folder / adapter
        place.mkdir(exist_ok=True)
        _save(model, adapter, place)
    return f"adapter {', '.join(weights.active)}"


def _save(model: Any, adapter: str, folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=_is_resized(model))
    # PEFT names weights as seen from its own wrapper.
    tensors = {f"base_model.model.{name}": tensor.detach() for name, tensor in state.items()}
    entries = [TensorEntry(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    with safetensors_writer(folder / _WEIGHTS_FILE, entries) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    saved = SafetensorsFile(folder / _WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if not torch.equal(saved.tensor(name), tensor.cpu()):
            raise ModelError("what was read back is not what was written", where=f"{folder}, {name}")
    saved.close()


def _is_resized(model: Any) -> bool:
    """Whether the embedding has other rows than the base's, so that the adapter is of no use without it."""
    from transformers import AutoConfig

    try:
        base = AutoConfig.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return base.get_text_config().vocab_size != model.get_input_embeddings().weight.shape[0]
