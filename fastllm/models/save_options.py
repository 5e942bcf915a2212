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
    "save_function": "weights are written as safetensors",
    "save_peft_format": "adapters are always written in PEFT's format",
    "datasets": "this format needs no calibration",
    "calibration_dataset": "this format needs no calibration",
    "num_calibration_samples": "this format needs no calibration",
    "max_seq_length": "this format needs no calibration",
}
# name -> (the values that ask for what is done anyway, what others ask for)
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "safe_serialization": ((True, None), "pickled weights, which run code when they are loaded"),
    "state_dict": ((None,), "weights that are not the model's"),
    "variant": ((None,), "file names with a variant"),
}
_SIGNATURE = {
    "save_pretrained_merged": (
        "save_directory", "tokenizer", "save_method", "push_to_hub", "token", "is_main_process", "max_shard_size",
        "tags",
    ),
    "push_to_hub_merged": (
        "repo_id", "tokenizer", "save_method", "use_temp_dir", "commit_message", "private", "token", "max_shard_size",
        "create_pr", "revision", "commit_description", "tags",
    ),
}  # fmt: skip


def settle_save_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise for an option that is unknown or not served; tell of one that has no effect."""
    reject_unknown(method, options, [*_SIGNATURE[method], *_WITHOUT_EFFECT, *_UNSUPPORTED])
    for name, (accepted, what) in _UNSUPPORTED.items():
        if name in options and not any(options[name] is value for value in accepted):
            raise UnsupportedError(f"{name}={options[name]!r} asks for {what}", where=method, fix=f"leave {name} out")
    for name, why in _WITHOUT_EFFECT.items():
        if options.get(name) is not None:
            notice(f"fastllm: {name} has no effect on {method}: {why}", once=f"{method} {name}")
