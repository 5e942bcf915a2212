"""How long a 16-bit model takes to become a GGUF file, and how much of that is quantizing.

    python -m benchmarks.gguf_export --model llama-3.1-8b --models /tmp/models [--method q4_k_m] [--out FILE]

`export_s` is `save_pretrained_gguf` from call to return: weights read from the checkpoint's files, quantized, written,
synced, read back and compared. `read_s` and `quantize_s` are the same reading, and the same quantizing of what is read,
each waited for and nothing beside it; the export does some of its work at the same time. Weights are random, of the
real shape.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from .evidence import environment
from .models import SHAPES, checkpoint

ROOT = Path(__file__).parents[1]
_PROBE = 2**30  # bytes that are written to see how fast the disk is


def wait() -> None:
    """Return when the GPU has nothing left to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parts(model: Any, method: str) -> dict[str, float]:
    """Seconds of reading all weights to the model's device, and of quantizing them there."""
    from fastllm.gguf.export import canonical_name
    from fastllm.gguf.quantizers import quantizer_of, regaining_factor
    from fastllm.models.gguf_saving import merged_tensors
    from fastllm.models.merge_plan import plan_merge

    plan = model.export_plan(quantization_method=method)
    types = {info.name: info.type for info in plan.tensors}
    read = quantize = 0.0
    started = time.perf_counter()
    for name, tensor in merged_tensors(plan_merge(model), model.device):
        wait()
        came = time.perf_counter()
        for target in plan.layout.targets.get(canonical_name(name), []):
            rows, quantizer = target.change(tensor), quantizer_of(types[target.name])
            rows = rows.reshape(-1, rows.shape[-1])
            quantizer.encode(rows, factor=regaining_factor(quantizer, rows, None))
        wait()
        read, quantize, started = read + came - started, quantize + time.perf_counter() - came, time.perf_counter()
    return {"read_s": round(read, 2), "quantize_s": round(quantize, 2)}


def disk_rate(folder: Path, num_bytes: int) -> float:
    """GB/s of writing and syncing random bytes to the folder's disk."""
    path = folder / ".rate"
    content = os.urandom(num_bytes)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - started) / 1e9
    finally:
        path.unlink()


def measure(name: str, models: Path, method: str) -> dict[str, Any]:
    import torch

    from fastllm import FastLanguageModel

    folder = checkpoint(name, models)
    started = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), dtype=torch.bfloat16, load_in_4bit=False, load_in_16bit=True
    )
    loaded = time.perf_counter() - started
    found: dict[str, Any] = {"model": name, "method": method, "load_s": round(loaded, 2)}
    found["weights"] = sum(p.numel() for p in model.parameters())
    # The parts come first: whatever is compiled or tuned at first use is in them and not in the export.
    found |= parts(model, method)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    written = model.save_pretrained_gguf(models / f"{name}-export", tokenizer, quantization_method=method)
    found["export_s"] = round(time.perf_counter() - started, 2)
    if torch.cuda.is_available():
        found["peak_beside_model_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    (path,) = map(Path, written["gguf_files"])
    found["file_bytes"] = path.stat().st_size
    found["disk_gb_s"] = round(disk_rate(path.parent, min(_PROBE, found["file_bytes"])), 2)
    path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/benchmark_models", help="for checkpoints")
    parser.add_argument("--method", default="q4_k_m")
    parser.add_argument("--out", type=Path, help="result file (default: by the GPU's name)")
    parser.add_argument("--commit", help="of these files, where they were copied here without their history")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    out = options.out or ROOT / f"benchmarks/results/gguf_export_{gpu.lower().replace(' ', '_')}.json"
    session = environment(options.commit, {"gpu": gpu, "cpu_cores": os.cpu_count()}, "gguf_export")
    session |= measure(options.model, options.models, options.method)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(session, indent=1) + "\n", encoding="utf-8")
    print("RESULT " + json.dumps({name: session[name] for name in session if name.endswith(("_s", "_gib", "bytes"))}))


if __name__ == "__main__":
    main()
