"""How fast weights become GGUF blocks: fastllm's quantizers against llama.cpp's encoder, the same rows and threads.

    python -m benchmarks.gguf_quantize [--threads 2] [--device cpu] [--out benchmarks/results/gguf_quantize_cpu.json]

llama.cpp's encoder is `ggml_quantize_chunk` of the `xllamacpp` wheel, called from that many threads on chunks of rows
as llama-quantize does it. Figures are millions of weights a second, the best of several runs, reading and writing of
files left out on both sides. On a GPU only ours runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

from fastllm.gguf.quantizers import quantizer_of
from fastllm.gguf.tensor_types import TENSOR_TYPES

ROWS, WIDTH = 1024, 4096
_CHUNK = 32 * 512  # weights that llama-quantize hands to a thread at once


def best_rate(run, num_weights: int, repeats: int) -> float:
    """Millions of weights a second of the fastest of `repeats` runs."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return num_weights / min(seconds) / 1e6


def ours(name: str, weights: torch.Tensor, importance: torch.Tensor | None):
    quantizer = quantizer_of(TENSOR_TYPES[name])

    def run() -> None:
        encoded = quantizer.encode(weights, importance)
        encoded[:1].cpu()  # wait for the device

    return run


def llama_cpp(name: str, weights: torch.Tensor, importance: torch.Tensor | None, threads: int):
    from tests.gguf import llama_cpp as judge

    rows = weights.numpy()
    columns = None if importance is None else importance.numpy()
    step = max(1, _CHUNK // rows.shape[1])
    chunks = [rows[start : start + step] for start in range(0, len(rows), step)]
    pool = ThreadPoolExecutor(threads)

    def run() -> None:
        for _ in pool.map(lambda chunk: judge.quantize(name, chunk, columns), chunks):
            pass

    return run


def measure(device: torch.device, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Rates by type and encoder."""
    torch.manual_seed(0)
    num_rows = ROWS if device.type == "cpu" else 16 * ROWS
    weights = (0.02 * torch.randn(num_rows, WIDTH)).to(device)
    importance = torch.rand(WIDTH).to(device)
    results: dict[str, dict[str, float]] = {}
    for name, kind in TENSOR_TYPES.items():
        if not kind.is_quantized:
            continue
        rates = {}
        for label, columns in (("", None), (" with importance", importance)):
            rates[f"fastllm{label}"] = best_rate(ours(name, weights, columns), weights.numel(), repeats)
            if device.type == "cpu":
                theirs = llama_cpp(name, weights, columns, threads)
                rates[f"llama.cpp{label}"] = best_rate(theirs, weights.numel(), repeats)
        results[name] = {label: round(rate, 1) for label, rate in rates.items()}
        print(f"{name:7s}", "  ".join(f"{label} {rate:.1f}" for label, rate in results[name].items()), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = {
        "what": "millions of fp32 weights a second to GGUF blocks, best of several runs",
        "rows": ROWS if device.type == "cpu" else 16 * ROWS,
        "width": WIDTH,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": options.threads,
        "torch": torch.__version__,
        "xllamacpp": version("xllamacpp") if device.type == "cpu" else None,
        "rates": measure(device, options.threads, options.repeats),
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
