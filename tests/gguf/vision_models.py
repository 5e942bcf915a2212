"""Tiny vision-language models of the families that are exported, with processors and pictures, made on the spot.

They have the patches and windows of the large ones, which llama.cpp fixes, and little else of their size. A picture is
as large as the processor makes it, so that both sides see the same pixels.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .models import save_byte_level_tokenizer

VOCAB_SIZE = 520
QUESTION = "what is in this picture?"
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_GEMMA = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
_TEXT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 32,
    "bos_token_id": 0, "eos_token_id": 4, "pad_token_id": 2,
    "rms_norm_eps": 1e-6,  # as the large models have it: llama.cpp's qwen2vl leaves a larger one out
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TOWER = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


@dataclass(frozen=True)
class VisionFamily:
    """The classes of a family and what makes a model of it tiny. `picture` is the width and height of its pictures."""

    prefix: str
    text: dict[str, Any]
    tower: dict[str, Any]
    picture: tuple[int, int]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gemma(self) -> bool:
        return self.prefix == "Gemma3"


FAMILIES = {
    "qwen2_vl": VisionFamily(
        "Qwen2VL",
        {"rope_parameters": {**_MROPE, "mrope_section": [4, 6, 6]}},
        {**_TOWER, "depth": 2, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
        picture=(168, 140),
    ),
    # 6 by 5 tokens, in windows of 4 by 4
    "qwen2_5_vl": VisionFamily(
        "Qwen2_5_VL",
        {"rope_parameters": {**_MROPE, "mrope_section": [4, 6, 6]}},
        {**_TOWER, "depth": 4, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 96,
         "window_size": 112, "fullatt_block_indexes": [1, 3]},
        picture=(168, 140),
    ),
    # positions of a table of 8 by 8 are interpolated to 12 by 10
    "qwen3_vl": VisionFamily(
        "Qwen3VL",
        {"rope_parameters": {**_MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}},
        {**_TOWER, "patch_size": 16, "depth": 4, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 96,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
        picture=(192, 160),
    ),
    # 8 by 8 patches, pooled to 4 by 4 tokens; the picture reaches past the window of the local layers
    "gemma3": VisionFamily(
        "Gemma3",
        {"query_pre_attn_scalar": 32, "sliding_window": 24, "num_hidden_layers": 7, "tie_word_embeddings": True,
         "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 112, "patch_size": 14, "vision_use_head": False},
        picture=(112, 112),
        settings={"mm_tokens_per_image": 16},
    ),
}  # fmt: skip


def tiny_vision_model(family: str, processor: Any, seed: int = 0, **settings: Any) -> Any:
    """A random fp32 model whose answer depends on the picture."""
    entry, tokenizer = FAMILIES[family], processor.tokenizer
    torch.manual_seed(seed)
    if entry.is_gemma:
        names = ("boi_token_index", "image_token_index", "eoi_token_index")
        tokens = dict(zip(names, tokenizer.convert_tokens_to_ids(_GEMMA), strict=True))
    else:
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
        tokens = dict(zip(names, tokenizer.convert_tokens_to_ids(_QWEN), strict=True))
    config = getattr(transformers, f"{entry.prefix}Config")(
        text_config={**_TEXT, **entry.text}, vision_config=entry.tower, **{**entry.settings, **settings}, **tokens
    )
    model = getattr(transformers, f"{entry.prefix}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if entry.is_gemma and name.endswith("language_model.norm.weight"):
                parameter.add_(3.0)  # its head is the embedding, and can't be large
            elif parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "mm_input_projection" in name:  # made of zeros
                parameter.normal_(std=0.2)
            elif "embed_tokens" in name:  # of Gemma also the head
                parameter.mul_(2.0)
            else:
                parameter.mul_(12.0 if "lm_head" in name else 5.0)
    return model


def older_name(family: str, name: str) -> str:
    """The name of a tensor in the checkpoints of transformers before version 5, as the published ones have it."""
    qwen = {"model.language_model.": "model.", "model.visual.": "visual."}
    gemma = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    for new, old in (gemma if FAMILIES[family].is_gemma else qwen).items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def make_processor(family: str, folder: Path) -> Any:
    """The processor of the family over a byte-level tokenizer, saved in `folder`."""
    entry = FAMILIES[family]
    tokens = _GEMMA if entry.is_gemma else _QWEN
    named = dict(zip(("boi_token", "image_token", "eoi_token"), _GEMMA, strict=True)) if entry.is_gemma else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        save_byte_level_tokenizer(folder), extra_special_tokens=named
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    picture = tokens[0] if entry.is_gemma else "".join(tokens[:3])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}" + picture + "{% elif 'text' in part %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    if entry.is_gemma:
        images = Gemma3ImageProcessorPil(
            size={"height": 112, "width": 112}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
        )
        processor = transformers.Gemma3Processor(
            images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=16
        )
    else:
        side = 2 * entry.tower["patch_size"]
        images = Qwen2VLImageProcessorPil(
            patch_size=entry.tower["patch_size"],
            merge_size=2,
            size={"shortest_edge": 8 * side**2, "longest_edge": 64 * side**2},
        )
        processor = _without_videos(f"{entry.prefix}Processor", images, tokenizer)
    processor.save_pretrained(folder)
    return processor


def _without_videos(name: str, images: Any, tokenizer: Any) -> Any:
    """A Qwen-VL processor, whose part for videos needs torchvision."""
    base = getattr(transformers, name)
    if importlib.util.find_spec("torchvision") is not None:
        videos = transformers.Qwen3VLVideoProcessor if "Qwen3" in name else transformers.Qwen2VLVideoProcessor
        return base(images, tokenizer, videos(), chat_template=tokenizer.chat_template)
    remaining = classmethod(lambda cls: ["image_processor", "tokenizer"])
    return type(name, (base,), {"get_attributes": remaining})(images, tokenizer, chat_template=tokenizer.chat_template)


def picture(family: str, seed: int = 0) -> Image.Image:
    """Large fields of colour with noise on them."""
    width, height = FAMILIES[family].picture
    generator = np.random.default_rng(seed)
    fields = generator.integers(0, 200, (-(-height // 28), -(-width // 28), 3))
    pixels = fields.repeat(28, 0).repeat(28, 1)[:height, :width] + generator.integers(0, 56, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def conversation(image: Any, question: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def inputs_of(family: str, processor: Any, image: Image.Image) -> Any:
    """What transformers makes of the conversation, less the empty lines around Gemma's image, which llama.cpp omits."""
    text = processor.apply_chat_template(conversation(image), tokenize=False, add_generation_prompt=True)
    if FAMILIES[family].is_gemma:
        processor.full_image_sequence = processor.full_image_sequence.strip()
    return processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")


def logprobs(model: Any, inputs: Any) -> torch.Tensor:
    """transformers' log p(next token | conversation), fp64 [V]."""
    model.eval()
    with torch.no_grad():
        return model(**inputs.to(model.device)).logits[0, -1].cpu().double().log_softmax(-1)
