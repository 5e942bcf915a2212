"""Vision-language checkpoints, trained adapters, and llama.cpp's divergence from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel

from ..gguf.vision_models import QUESTION, VOCAB_SIZE, inputs_of, logprobs, make_processor, picture, tiny_vision_model
from .checkpoints import disturb


def make_vision_base(folder: Path, family: str) -> Path:
    """A bf16 checkpoint of the family with its processor."""
    folder.mkdir(parents=True)
    processor = make_processor(family, folder)
    tiny_vision_model(family, processor).to(torch.bfloat16).save_pretrained(folder)
    return folder


def load_vision(folder: Path, bits: int = 16) -> tuple[Any, Any]:
    """(model, processor) by fastllm, the decoder's linear layers held in 4 or 16 bits, the rest in fp32."""
    return FastVisionModel.from_pretrained(str(folder), load_in_4bit=bits == 4, dtype=torch.float32)


def adapted_vision(folder: Path, bits: int = 16, **options: Any) -> tuple[Any, Any]:
    """(model with a LoRA in tower and decoder whose every part is away from its start, processor)."""
    model, processor = load_vision(folder, bits)
    model = FastVisionModel.get_peft_model(model, r=4, lora_alpha=8, **options)
    disturb(model, scale=0.03)
    return FastVisionModel.for_inference(model), processor


def vision_on_16_bit_base(model: Any, base: Path, scratch: Path) -> Any:
    """The adapter as PEFT runs it on the base checkpoint in fp32."""
    model.save_pretrained(scratch)
    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), scratch)


def vision_divergence(judge: Any, family: str, written: dict, reference: Any, processor: Any, **options: Any) -> float:
    """KL(reference || llama.cpp) of the next token after an image and a question, for the first and the last of the
    written files."""
    path, mmproj, image = written["gguf_files"][0], written["gguf_files"][-1], picture(family)
    expected = logprobs(reference, inputs_of(family, processor, image))
    with judge.loaded(path, VOCAB_SIZE, mmproj=mmproj, **options) as loaded:
        got = torch.from_numpy(loaded.image_logprobs(image, QUESTION)).double()
    return abs(float((expected.exp() * (expected - got)).sum()))
