"""Loading the processor of a vision-language model: its tokenizer, and what makes pixels of images."""

from __future__ import annotations

import importlib.util
from typing import Any

from .._errors import MissingPackageError, TokenizerError
from .._notices import notice


def load_processor(name: str, config: Any, *, max_length: int | None, padding_side: str, **options: Any) -> Any:
    """`AutoProcessor` of a folder or repository, for a model of `config`. Without torchvision, a processor that also
    takes videos is loaded for images only: transformers has no other code for videos.

    Raises:
        MissingPackageError: pillow is not installed.
        TokenizerError: there is no processor under that name.
    """
    from transformers import AutoProcessor

    if importlib.util.find_spec("PIL") is None:
        raise MissingPackageError("images need pillow", where=name, fix='pip install "fastllm[vision]"')
    try:
        if importlib.util.find_spec("torchvision") is None:
            processor = _without_torchvision(name, config, **options)
        else:
            processor = AutoProcessor.from_pretrained(name, config=config, **options)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"no processor could be loaded ({error})".splitlines()[0],
            where=name,
            fix="save one there with processor.save_pretrained, or name another with tokenizer_name=...",
        ) from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise TokenizerError("it has no processor, only a " + type(processor).__name__, where=name)
    tokenizer.padding_side = padding_side
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return processor


def _without_torchvision(name: str, config: Any, **options: Any) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    processor_class: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        return AutoProcessor.from_pretrained(name, config=config, **options)
    notice("fastllm: torchvision is not installed: the processor takes images, and no videos", once="torchvision")
    return _images_only(processor_class).from_pretrained(name, **options)


def _images_only(processor_class: Any) -> Any:
    """The processor class without its part for videos. The name stays: it is written into saved folders."""
    remaining = [name for name in processor_class.get_attributes() if name != "video_processor"]
    attributes = {"get_attributes": classmethod(lambda cls: remaining), "__module__": __name__}
    return type(processor_class.__name__, (processor_class,), attributes)
