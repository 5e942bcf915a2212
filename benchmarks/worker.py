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

from .cases import CASES
from .older_gpus import hold_to, take_at_most


def measure(options: argparse.Namespace) -> dict[str, Any]:
    case = CASES[options.case]
    started = time.perf_counter()
    __import__(options.peer if options.peer in ("unsloth", "fastllm") else "transformers")
    import torch

    import_s = time.perf_counter() - started
    from .peers import Setting, load

    on_gpu = torch.cuda.is_available()
    if on_gpu and case.memory_gib:
        take_at_most(case.memory_gib)
    if on_gpu and case.held_to:
        hold_to(case.held_to)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def peak(kind: str) -> float:
        return getattr(torch.cuda, f"max_memory_{kind}")() / 2**30 if on_gpu else 0.0

    started = time.perf_counter()
    setting = Setting(options.model, case.bits, case.rank, options.way, case.sequence, case.images > 0, case.dtype)
    model, processing_class = load(options.peer, setting)
    wait()
    load_s = time.perf_counter() - started

    gc.collect()
    load_peak = peak("reserved")
    if on_gpu and not case.from_start:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
    if case.trainer:
        from .trainer_steps import train_with_trainer

        trained = train_with_trainer(case, options.peer, options.way, model, processing_class, wait)
    else:
        from .training import train

        trained = train(case, options.peer, model, wait)
    times = trained.times
    timed = times[case.warmup :]
    step_s = statistics.median(timed)
    samples = case.batch * case.accumulate
    result = {
        "model": case.model, "bits": case.bits, "rank": case.rank, "batch": case.batch, "sequence": case.sequence,
        "accumulate": case.accumulate, "trainer": case.trainer, "document": case.document, "images": case.images,
        "memory_gib": case.memory_gib, "held_to": case.held_to, "dtype": case.dtype, "from_start": case.from_start,
        "warmup": case.warmup, "steps": case.steps,
        "import_s": round(import_s, 2), "load_s": round(load_s, 1), "first_step_s": round(times[0], 2),
        "step_s": round(step_s, 4), "step_s_min": round(min(timed), 4), "step_s_max": round(max(timed), 4),
        "tokens_per_s": round(trained.tokens / step_s), "samples_per_s": round(samples / step_s, 3),
        "weights_gib": round(weights, 2), "peak_allocated_gib": round(peak("allocated"), 2),
        "peak_reserved_gib": round(peak("reserved"), 2), "load_peak_reserved_gib": round(load_peak, 2),
        "losses": [round(value, 5) for value in trained.losses[:6]], "first_grad_norm": trained.first_gradient_norm,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    if options.peer == "fastllm":
        result["report"] = str(model.fast_report())
    if options.profile:
        print("RESULT " + json.dumps(result), flush=True)  # a profiler that fails takes nothing with it
        result["profile"] = trained.profile()
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
