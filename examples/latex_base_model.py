"""A small base model for `vision_latex_ocr.py`: shaped like Qwen2.5-VL, made and trained here, with nothing downloaded.

It learns to read short formulas aloud: a picture of x² + α is "x to the 2 plus alpha". LaTeX it knows as text, as every
language model does, and never with a picture.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from latex_formulas import Formula, Page, pictures
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import SFTConfig, SFTTrainer

from fastllm import FastVisionModel, is_bf16_supported
from fastllm.trainer import UnslothVisionDataCollator

READ_ALOUD, WRITE = "Read this formula aloud.", "Write a formula."
PATCH = 8
Lesson = tuple[Sequence[Formula], int]  # formulas, and the steps that are taken on them
IMAGE_TOKENS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
END = "<|im_end|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", END, *IMAGE_TOKENS.values()]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(
    folder: Path, lessons: Sequence[Lesson], page: Page, *, width: int, layers: int, batch_size: int
) -> list[tuple[int, float]]:
    """Write a checkpoint of `width` and `layers` that has learned to read formulas aloud, one lesson after
    the other, and in the last also LaTeX without pictures. Returns the losses, (step, loss)."""
    drawn = [(pictures(formulas, page), steps) for formulas, steps in lessons]
    tokenizer = make_tokenizer([text for formulas, _ in lessons for formula in formulas for text in formula])
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 256 * 256}
    # White paper is zero: what a patch is worth is its ink.
    levels = {"image_mean": [1.0] * 3, "image_std": [0.5] * 3}
    Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=size, **levels).save_pretrained(folder)
    torch.manual_seed(3407)
    Qwen2_5_VLForConditionalGeneration(shape(tokenizer, width, layers)).save_pretrained(folder)

    model, processor = FastVisionModel.from_pretrained(
        str(folder), full_finetuning=True, float32_mixed_precision=True, use_gradient_checkpointing=False
    )
    losses: list[tuple[int, float]] = []
    taken = 0
    for number, (shown, steps) in enumerate(drawn, start=1):
        rows = [conversation(READ_ALOUD, formula.spoken, image) for formula, image in shown]
        is_last = number == len(drawn)
        if is_last:
            rows += [conversation(WRITE, formula.latex) for formula, _ in shown]
        # All passes over the rows in one epoch: the processes that make batches then start once.
        passes = -(-steps * batch_size // len(rows))
        trainer = SFTTrainer(
            model=model,
            processing_class=processor,
            data_collator=UnslothVisionDataCollator(model, processor, train_on_responses_only=True, resize="max"),
            train_dataset=rows * passes,
            args=SFTConfig(
                per_device_train_batch_size=batch_size,
                max_steps=steps,
                learning_rate=1e-3,
                warmup_steps=steps // 10,
                lr_scheduler_type="cosine" if is_last else "constant_with_warmup",
                logging_steps=max(1, steps // 100),
                save_strategy="no",
                seed=3407,
                output_dir=str(folder / "run"),
                report_to="none",
                **machine(),
            ),
        )
        trainer.train()
        losses += [(taken + entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        taken += steps
    model.save_pretrained(folder)
    return losses


def machine() -> dict[str, Any]:
    """What a trainer's arguments are on this machine: bf16 and processes that make batches, where there is a GPU."""
    if not torch.cuda.is_available():
        return {}
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    precision = {"bf16": True} if is_bf16_supported() else {"fp16": True}
    return {**precision, "dataloader_num_workers": workers}


def conversation(instruction: str, answer: str, image: Image.Image | None = None) -> dict[str, Any]:
    question: list[dict[str, Any]] = [{"type": "text", "text": instruction}]
    if image is not None:
        question.append({"type": "image", "image": image})
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    r"""Byte-level BPE, as Qwen's. Words and commands such as \frac are one token each, and so are braces and digits."""
    core = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r" ?\\?[A-Za-z]+| ?[^\sA-Za-z]"), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence([pieces, by_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [*texts, READ_ALOUD, WRITE, "user assistant"],
        trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=SPECIAL[0], chat_template=CHAT_TEMPLATE
    )


def shape(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> Qwen2_5_VLConfig:
    """Decoder and tower of so many layers, heads of 64; windows of 4 x 4 image tokens, every second block sees all."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
            "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        vision_config={
            "depth": layers, "hidden_size": width, "out_hidden_size": width, "intermediate_size": 3 * width,
            "num_heads": width // 64, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 8 * PATCH, "fullatt_block_indexes": list(range(1, layers, 2)),
        },
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in IMAGE_TOKENS.items()},
    )  # fmt: skip
