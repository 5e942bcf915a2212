"""Arguments of the saving methods that come from Unsloth and transformers and decide nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._errors import UnsupportedError, reject_unknown
from .._notices import notice

# name -> why a value has no effect
_WITHOUT_EFFECT = {
    "temporary_location": "tensors are streamed and need no place in between",
    "maximum_memory_usage": "one tensor is in memory at a time",
    "save_function": "no weights are pickled",
    "datasets": "a model card names no data sets",
}
_ONLY_MERGED = {
    "save_peft_format": "adapters are always written in PEFT's format",
}
_ONLY_GGUF = {
    "first_conversion": "each type is made of the merged fp32 values, not of a first GGUF file",
    "merge_is_disposable": "no merged model is written in between",
    "max_shard_size": "a GGUF file is written whole",
    "save_peft_format": "a GGUF file has its own format",
}
# name -> (the values that ask for what is done anyway, what others ask for)
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": ((True, None), "pickled weights, which run code when they are loaded"),
    "state_dict": ((None,), "weights that are not the model's"),
    "variant": ((None,), "file names with a variant"),
}
_COMMIT = (
    "repo_id", "tokenizer", "save_method", "commit_message", "private", "token", "create_pr", "revision",
    "commit_description", "tags",
)  # fmt: skip
_CALIBRATION = ("calibration_dataset", "num_calibration_samples", "max_seq_length", "target_bpw", "max_size")
_GGUF = ("quantization_method", "mmproj_type", "imatrix_file", *_CALIBRATION)
# method -> (its own arguments, further ones without effect)
_METHODS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "save_pretrained_merged": (
        ("save_directory", "tokenizer", "save_method", "push_to_hub", "token", "is_main_process", "max_shard_size",
         "tags", *_CALIBRATION),
        _ONLY_MERGED,
    ),
    "push_to_hub_merged": ((*_COMMIT, "use_temp_dir", "max_shard_size", *_CALIBRATION), _ONLY_MERGED),
    "save_pretrained_gguf": (
        ("save_directory", "tokenizer", "save_method", "push_to_hub", "token", "private", "is_main_process", "tags",
         *_GGUF),
        _ONLY_GGUF,
    ),
    "push_to_hub_gguf": (
        (*_COMMIT, *_GGUF, "temporary_location"),
        {**_ONLY_GGUF, "use_temp_dir": "the files go when they are uploaded"},
    ),
}  # fmt: skip


def settle_save_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise for an option that is unknown or not served; tell of one that has no effect."""
    own, further = _METHODS[method]
    without_effect = _WITHOUT_EFFECT | further
    reject_unknown(method, options, [*own, *without_effect, *_UNSUPPORTED])
    for name, (accepted, what) in _UNSUPPORTED.items():
        if name in options and not any(options[name] is value for value in accepted):
            raise UnsupportedError(f"{name}={options[name]!r} asks for {what}", where=method, fix=f"leave {name} out")
    for name, why in without_effect.items():
        if options.get(name) is not None:
            notice(f"fastllm: {name} has no effect on {method}: {why}", once=f"{method} {name}")
