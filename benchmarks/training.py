"""The steps of a case in a plain loop: forward under autocast, backward, 8-bit AdamW; in fp16 with a scaled loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .cases import Case
from .models import IMAGE_TOKEN, VISION_END, VISION_START

MERGE = 2  # patches of an image side by side become one token of the decoder
PATCH_VALUES = 3 * 2 * 14 * 14


class Trained(NamedTuple):
    """Seconds and loss of each step, warm-up included, the tokens of a step, on average, and `profile`, which takes
    another step to break it down."""

    times: list[float]
    losses: list[float]
    first_gradient_norm: float
    tokens: float
    profile: Callable[[], dict[str, Any]]


def batches(case: Case, vocabulary: int, device: Any) -> list[dict[str, Any]]:
    """Two batches of random tokens, and of random images where the case has them; labels leave image tokens out."""
    import torch

    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        ids = torch.randint(8, vocabulary, (case.batch, case.sequence), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if case.images:
            rows, columns = 8, case.images // 8
            tokens = case.images // MERGE**2
            ids[:, 5], ids[:, 6 : 6 + tokens], ids[:, 6 + tokens] = VISION_START, IMAGE_TOKEN, VISION_END
            batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long()
            batch["image_grid_thw"] = torch.tensor([[1, rows, columns]] * case.batch)
            batch["pixel_values"] = torch.randn(case.batch * case.images, PATCH_VALUES, generator=generator)
        else:
            del batch["attention_mask"]
        batch["labels"] = ids.masked_fill(ids == IMAGE_TOKEN, -100)
        made.append({name: value.to(device) for name, value in batch.items()})
    return made


def optimizer_class(peer: str) -> Any:
    """The 8-bit AdamW that users of a library get: fastllm has its own, with the bits of bitsandbytes'."""
    import bitsandbytes

    if peer == "fastllm":
        import fastllm

        return fastllm.AdamW8bit
    return bitsandbytes.optim.AdamW8bit


def train(case: Case, peer: str, model: Any, wait: Callable[[], None]) -> Trained:
    """Train a case in the loop. `wait` returns when the GPU has nothing left to do."""
    import torch

    from .profiling import profile_step

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(peer)(parameters, lr=2e-4, weight_decay=0.01)
    device = parameters[0].device
    dtype = getattr(torch, case.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    data = batches(case, model.get_input_embeddings().weight.shape[0], device)

    def step(index: int) -> tuple[Any, float]:
        """(loss, norm of the gradients of the first step)"""
        total, norm = 0.0, 0.0
        for micro in range(case.accumulate):
            with torch.autocast(device.type, dtype=dtype):
                loss = model(**data[(index + micro) % 2]).loss / case.accumulate
            scaler.scale(loss).backward()
            total = total + loss.detach()
        scaler.unscale_(optimizer)
        if index == 0:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    times, losses, norms = [], [], []
    for index in range(case.warmup + case.steps):
        wait()
        started = time.perf_counter()
        loss, norm = step(index)
        wait()
        times.append(time.perf_counter() - started)
        losses.append(float(loss))
        norms.append(norm)
    tokens = case.batch * case.accumulate * case.sequence
    return Trained(times, losses, norms[0], tokens, lambda: profile_step(lambda: step(1)))
