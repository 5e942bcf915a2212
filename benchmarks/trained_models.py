"""Small language models trained from scratch through fastllm's full fine-tuning, in minutes, to real skill.

Shapes are those of families with random weights; the learning rate falls with the share of the steps or of the time
that has passed, whichever is more, so that a run ends well in the time that it is given.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .library_text import SPECIAL_TOKENS


@dataclass(frozen=True)
class Shape:
    """A model and the batches it is trained on. `settings` are those of the family's configuration."""

    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    batch: int
    steps: int
    learning_rate: float
    row: int = 1024


SHAPES: dict[str, dict[str, Shape]] = {
    "full": {  # for a data-centre GPU
        "llama": Shape(1024, 3584, 9, 16, 4, 64, batch=64, steps=4000, learning_rate=1.2e-3),
        "qwen3": Shape(768, 2304, 10, 12, 4, 64, batch=64, steps=3000, learning_rate=1.5e-3),
        "gemma3": Shape(768, 2304, 10, 6, 2, 128, batch=64, steps=3000, learning_rate=1.5e-3),
    },
    "small": {  # minutes on a CPU
        family: Shape(256, 768, 6, 4, 2, 64, batch=8, steps=1000, learning_rate=3e-3, row=128)
        for family in ("llama", "qwen3", "gemma3")
    },
    "toy": {
        family: Shape(256, 512, 2, 4, 2, 64, batch=4, steps=6, learning_rate=3e-3, row=64)
        for family in ("llama", "qwen3", "gemma3")
    },
}  # fmt: skip
_CLASSES = {"llama": "Llama", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True},
    "gemma3": {"sliding_window": 512},
}
_WARMUP = 0.03
_LAST = 0.02  # of the learning rate


def random_checkpoint(family: str, shape: Shape, tokenizer: Any, folder: Path) -> Path:
    """A checkpoint of the family's shape with random bf16 weights and the tokenizer."""
    import torch
    import transformers

    settings = dict(_SETTINGS[family])
    if family == "gemma3":
        settings["query_pre_attn_scalar"] = shape.head_dim
    config = getattr(transformers, f"{_CLASSES[family]}Config")(
        vocab_size=len(tokenizer), hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim, max_position_embeddings=2048,
        **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), range(len(SPECIAL_TOKENS)), strict=True)),
        **settings,
    )  # fmt: skip
    torch.manual_seed(3407)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(checkpoint: Path, rows: Any, shape: Shape, seconds: float, target: Path) -> dict[str, Any]:
    """Train the checkpoint on `rows` for `shape.steps` steps or until `seconds` are over, and save it in 16 bits to
    `target`. Returns what was done. The first step, which compiles kernels, is not counted in the time."""
    import torch

    from fastllm import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=shape.row, dtype=torch.bfloat16, full_finetuning=True,
        float32_mixed_precision=True, use_gradient_checkpointing=False,
    )  # fmt: skip
    device = model.device
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=shape.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    order = torch.Generator().manual_seed(1)
    places = torch.randperm(len(rows), generator=order)
    losses, steps, started, passed = [], 0, time.perf_counter(), 0.0
    model.train()
    while steps < shape.steps and passed < seconds:
        rate = shape.learning_rate * _share(max(steps / shape.steps, passed / seconds))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [(steps * shape.batch + i) % len(rows) for i in range(shape.batch)]
        ids = rows[places[chosen]].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        steps += 1
        if steps == 1 or steps % 10 == 0:  # asking the device for a loss waits for it
            losses[-1].item()
            started = time.perf_counter() if steps == 1 else started
            passed = time.perf_counter() - started
        if steps % 100 == 0:
            print(f"  step {steps}, {passed:.0f} s: loss {float(losses[-1]):.3f}", flush=True)
    rows_seen = steps * shape.batch
    model.save_pretrained_merged(target, tokenizer)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "tokens": rows_seen * shape.row,
        "epochs": round(rows_seen / len(rows), 2), "seconds": round(passed, 1),
        "tokens_per_s": round(rows_seen * shape.row / passed) if passed else None,
        "losses": [round(float(loss), 4) for loss in (*losses[:1], *losses[99::100], losses[-1])],
    }  # fmt: skip


def _share(progress: float) -> float:
    """Of the learning rate: a linear rise, then half a cosine down to `_LAST`."""
    if progress < _WARMUP:
        return max(progress / _WARMUP, 0.01)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - _WARMUP) / (1 - _WARMUP))))
