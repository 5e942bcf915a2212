"""One measurement in its own process: a peer trains a case for some steps. Prints lines of JSON, the last one counts.

Libraries that change others at import can't share a process, and memory is only comparable from a fresh start.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

from .cases import CASES, Case
from .models import IMAGE_TOKEN, VISION_END, VISION_START

MERGE = 2  # patches of an image side by side become one token of the decoder
PATCH_VALUES = 3 * 2 * 14 * 14


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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    case = CASES[options.case]
    started = time.perf_counter()
    __import__(options.peer if options.peer in ("unsloth", "fastllm") else "transformers")
    import torch

    import_s = time.perf_counter() - started
    from .peers import Setting, load

    on_gpu = torch.cuda.is_available()
    if on_gpu and case.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.memory_gib * 2**30 / total))

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def peak(kind: str) -> float:
        return getattr(torch.cuda, f"max_memory_{kind}")() / 2**30 if on_gpu else 0.0

    started = time.perf_counter()
    setting = Setting(options.model, case.bits, case.rank, options.way, case.sequence, vision=case.images > 0)
    model = load(options.peer, setting)
    wait()
    load_s = time.perf_counter() - started
    import bitsandbytes

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=2e-4, weight_decay=0.01)
    device = parameters[0].device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    data = batches(case, vocabulary, device)

    gc.collect()
    load_peak = peak("reserved")
    if on_gpu and not case.from_start:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0

    def step(index: int) -> tuple[float, float]:
        """(loss, norm of the gradients of the first step)"""
        total, norm = 0.0, 0.0
        for micro in range(case.accumulate):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(**data[(index + micro) % 2]).loss / case.accumulate
            loss.backward()
            total = total + loss.detach()
        if index == 0:
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        optimizer.step()
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
    timed = times[case.warmup :]
    step_s = statistics.median(timed)
    samples = case.batch * case.accumulate
    result = {
        "model": case.model, "bits": case.bits, "rank": case.rank, "batch": case.batch, "sequence": case.sequence,
        "accumulate": case.accumulate, "images": case.images, "memory_gib": case.memory_gib,
        "from_start": case.from_start, "warmup": case.warmup, "steps": case.steps,
        "import_s": round(import_s, 2), "load_s": round(load_s, 1), "first_step_s": round(times[0], 2),
        "step_s": round(step_s, 4), "step_s_min": round(min(timed), 4), "step_s_max": round(max(timed), 4),
        "tokens_per_s": round(samples * case.sequence / step_s), "samples_per_s": round(samples / step_s, 3),
        "weights_gib": round(weights, 2), "peak_allocated_gib": round(peak("allocated"), 2),
        "peak_reserved_gib": round(peak("reserved"), 2), "load_peak_reserved_gib": round(load_peak, 2),
        "losses": [round(value, 5) for value in losses[:6]], "first_grad_norm": norms[0],
        "trainable": sum(p.numel() for p in parameters),
    }  # fmt: skip
    if options.peer == "fastllm":
        result["report"] = str(model.fast_report())
    if options.profile:
        print("RESULT " + json.dumps(result), flush=True)  # a profiler that fails takes nothing with it
        from .profiling import profile_step

        result["profile"] = profile_step(lambda: step(1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=CASES)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--way", required=True, help="of holding activations")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--profile", action="store_true", help="add a breakdown of one step by kernel class")
    options = parser.parse_args()
    options.model = str(options.model)
    print("RESULT " + json.dumps(measure(options)), flush=True)


if __name__ == "__main__":
    main()
