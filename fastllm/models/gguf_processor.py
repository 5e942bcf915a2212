"""What a GGUF export needs of the tokenizer or processor that was given, or that the model was loaded with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._errors import TokenizerError
from .model_methods import TOKENIZER


def processor_of(model: Any, given: Any) -> Any:
    """The tokenizer or processor. Raises `TokenizerError` where there is none."""
    found = given if given is not None else getattr(model, TOKENIZER, None)
    if found is None:
        raise TokenizerError(
            "a GGUF file holds the tokenizer, and none was given", where="save_pretrained_gguf",
            fix='model.save_pretrained_gguf("folder", tokenizer)',
        )  # fmt: skip
    return found


def tokenizer_of(model: Any, given: Any) -> Any:
    """The tokenizer, of a processor its own. Raises `TokenizerError` where there is none."""
    found = processor_of(model, given)
    return getattr(found, "tokenizer", found)


def chat_template_of(model: Any, given: Any) -> str | None:
    """The template of a processor, which its tokenizer may lack; None where the tokenizer's own counts."""
    found = getattr(processor_of(model, given), "chat_template", None)
    return found if isinstance(found, str) else None


def image_settings(model: Any, given: Any) -> dict[str, Any]:
    """The configuration of the image processor. Raises `TokenizerError` where there is none."""
    for processor in (given, getattr(model, TOKENIZER, None)):
        found = getattr(processor, "image_processor", None)
        if found is not None:
            return found.to_dict()
    raise TokenizerError(
        "an mmproj file says how pixels are normalised, and no image processor was given",
        where="save_pretrained_gguf", fix='model.save_pretrained_gguf("folder", processor)',
    )  # fmt: skip


@contextmanager
def saved_tokenizer(tokenizer: Any) -> Iterator[Path]:
    """The tokenizer's files in a folder that goes again."""
    with tempfile.TemporaryDirectory(prefix="fastllm-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder)
