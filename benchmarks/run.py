"""Measure fastllm beside the libraries that are installed here, and write the evidence.

    python -m benchmarks.run                          every case, every installed peer
    python -m benchmarks.run --cases qlora-8b --peers fastllm unsloth

Each measurement is a process of its own (`benchmarks.worker`), one after the other, on random weights of real shapes
and random tokens. The result goes to `benchmarks/results/<name>.json` with the commit, the versions and the GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from .models import checkpoint
from .peers import CHECKPOINTING

RESULTS = Path(__file__).parent / "results"
MODULES = {"hf": "peft", "liger": "liger_kernel", "unsloth": "unsloth", "fastllm": "fastllm"}
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo")

# name -> (shape, worker options); every case runs in each way of checkpointing that a peer has.
CASES: dict[str, tuple[str, dict[str, int]]] = {
    "qlora-8b": ("llama-3.1-8b", {"bits": 4, "batch": 4, "sequence": 2048}),
    "qlora-8b-long": ("llama-3.1-8b", {"bits": 4, "batch": 1, "sequence": 32768}),
    "qlora-8b-short": ("llama-3.1-8b", {"bits": 4, "batch": 1, "sequence": 512, "accumulate": 4}),
    "lora-8b": ("llama-3.1-8b", {"bits": 16, "batch": 4, "sequence": 2048}),
    "full-1b": ("llama-3.2-1b", {"bits": 0, "batch": 4, "sequence": 2048}),
    "smoke": ("toy", {"bits": 4, "batch": 1, "sequence": 64, "warmup": 1, "steps": 2}),
}


def environment(commit: str | None) -> dict:
    """What a figure depends on."""
    import torch

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
        return done.stdout.strip()

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "clean": commit is not None or git("status", "--porcelain", "--untracked-files=no") == "",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "command": "python -m benchmarks.run " + " ".join(sys.argv[1:]),
    }


def ceilings() -> dict:
    """The machine's own rates in this session: a large bf16 product and a large copy."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_ms = do_bench(lambda: a @ b, rep=300, return_mode="median")
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    return {"gemm_tflops": round(2 * 8192**3 / product_ms / 1e9), "copy_tb_s": round(4 * 2**30 / copy_ms / 1e9, 2)}


def run_case(name: str, peer: str, checkpointing: str, folder: Path, timeout_s: int) -> dict:
    shape, options = CASES[name]
    command = [
        sys.executable, "-m", "benchmarks.worker", "--peer", peer, "--model", str(checkpoint(shape, folder)),
        "--checkpointing", checkpointing,
    ]  # fmt: skip
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=RESULTS.parents[1]
        )
    except subprocess.TimeoutExpired:
        return {"case": name, "peer": peer, "checkpointing": checkpointing, "error": f"no result in {timeout_s} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return {"case": name, **json.loads(line.removeprefix("RESULT "))}
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"case": name, "peer": peer, "checkpointing": checkpointing, "error": last[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name != "smoke"])
    parser.add_argument("--peers", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--checkpointing", nargs="+", default=["least", "none", "default"])
    parser.add_argument("--models", type=Path, default=Path("outputs/benchmark_models"))
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<gpu>.json)")
    parser.add_argument("--commit", help="of these files, where they were copied here without their history")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a measurement may take")
    options = parser.parse_args()

    installed = [peer for peer in options.peers if importlib.util.find_spec(MODULES[peer]) is not None]
    evidence = {**environment(options.commit), "ceilings": ceilings(), "results": []}
    out = options.out or RESULTS / f"{evidence['gpu'].lower().replace(' ', '_')}.json"
    for name in options.cases:
        for peer in installed:
            for checkpointing in (way for way in options.checkpointing if way in CHECKPOINTING[peer]):
                result = run_case(name, peer, checkpointing, options.models, options.timeout)
                evidence["results"].append(result)
                print(_line(result), flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(evidence, indent=1) + "\n")
    print(f"written to {out}")


def _line(result: dict) -> str:
    head = f"{result['case']:16} {result['peer']:8} {result['checkpointing']:8}"
    if "error" in result:
        return f"{head} {result['error']}"
    return (
        f"{head} {result['tokens_per_s']:>7,} tokens/s, peak {result['peak_reserved_gib']:6.2f} GiB reserved, "
        f"load {result['load_s']:5.1f} s, first step {result['first_step_s']:5.2f} s, loss {result['losses'][0]:.4f}"
    )


if __name__ == "__main__":
    main()
