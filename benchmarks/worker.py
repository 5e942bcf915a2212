"""One measurement in its own process: a peer trains a setting for some steps. Prints one line of JSON.

Libraries that change others at import can't share a process, and memory is only comparable from a fresh start.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time


def measure(options: argparse.Namespace) -> dict:
    started = time.perf_counter()
    __import__(options.peer if options.peer in ("unsloth", "fastllm") else "transformers")
    import_s = time.perf_counter() - started

    from .peers import Setting, load

    setting = Setting(options.model, options.bits, options.rank, options.checkpointing, options.sequence)
    started = time.perf_counter()
    model = load(options.peer, setting)
    import bitsandbytes
    import torch

    on_gpu = torch.cuda.is_available()
    load_s = time.perf_counter() - started
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=options.learning_rate, weight_decay=0.01)
    device = parameters[0].device
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch, options.sequence)
    data = [torch.randint(4, model.config.vocab_size, shape, generator=generator).to(device) for _ in range(2)]

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def peak(kind: str) -> float:
        return getattr(torch.cuda, f"max_memory_{kind}")() / 2**30 if on_gpu else 0.0

    gc.collect()
    load_peak = peak("reserved")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
    times, losses, norms = [], [], []
    for index in range(options.warmup + options.steps):
        wait()
        started = time.perf_counter()
        total = 0.0
        for micro in range(options.accumulate):
            x = data[(index + micro) % 2]
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=x, labels=x).loss / options.accumulate
            loss.backward()
            total = total + loss.detach()
        if index == 0:
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        times.append(time.perf_counter() - started)
        losses.append(float(total))
    timed = times[options.warmup :]
    step_s = statistics.median(timed)
    tokens = options.batch * options.sequence * options.accumulate
    return {
        "peer": options.peer, "model": options.model.rstrip("/").rsplit("/", 1)[-1], "bits": options.bits,
        "rank": options.rank, "checkpointing": options.checkpointing, "batch": options.batch,
        "sequence": options.sequence, "accumulate": options.accumulate, "warmup": options.warmup,
        "steps": options.steps, "import_s": round(import_s, 2), "load_s": round(load_s, 1),
        "first_step_s": round(times[0], 2), "step_s": round(step_s, 4), "step_s_min": round(min(timed), 4),
        "step_s_max": round(max(timed), 4), "tokens_per_s": round(tokens / step_s),
        "weights_gib": round(weights, 2), "peak_allocated_gib": round(peak("allocated"), 2),
        "peak_reserved_gib": round(peak("reserved"), 2), "load_peak_reserved_gib": round(load_peak, 2),
        "losses": [round(value, 5) for value in losses[:6]], "first_grad_norm": norms[0],
        "trainable": sum(p.numel() for p in parameters),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpointing", required=True)
    for name, default in (("bits", 4), ("rank", 16), ("batch", 4), ("sequence", 2048), ("accumulate", 1),
                          ("warmup", 3), ("steps", 10)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    print("RESULT " + json.dumps(measure(parser.parse_args())), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
