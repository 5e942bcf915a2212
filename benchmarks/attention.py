"""How fast attention is: fastllm's own kernel beside torch's, for whole rows, packed documents, windows and soft caps.

    python -m benchmarks.attention [--out benchmarks/results/attention_<gpu>.json]

Each kernel runs as a decoder layer calls it, forward and backward by themselves, on bf16 heads of random numbers, alone
on the GPU. Rates count the pairs of a query and a key that it sees: two products of them forward, five backward. A
kernel that does not serve a case is left out of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evidence import ROOT, environment
from .limits import MANY_CALLS, machine, measured_seconds

BACKENDS = ("triton", "cudnn", "flash", "varlen", "efficient")


@dataclass(frozen=True)
class Rows:
    """One case: rows of tokens, in documents of `document` tokens where that is not 0."""

    batch: int
    sequence: int
    heads: int = 32
    key_value_heads: int = 8
    head_dim: int = 128
    document: int = 0
    window: int = 0
    softcap: float = 0.0
    causal: bool = True

    @property
    def pairs(self) -> int:
        """How many keys all queries of a head see."""
        length = self.document or self.sequence
        if not self.causal:
            return self.batch * self.sequence * length
        window = min(self.window or length, length)
        one = window * (window + 1) // 2 + (length - window) * window
        return self.batch * self.sequence // length * one


CASES = {
    "4 x 2048": Rows(4, 2048),
    "1 x 8192": Rows(1, 8192),
    "1 x 32768": Rows(1, 32768),
    "1 x 8192 in documents of 512": Rows(1, 8192, document=512),
    "1 x 32768 in documents of 4096": Rows(1, 32768, document=4096),
    "1 x 32768, window of 4096": Rows(1, 32768, window=4096),
    "1 x 8192 in documents of 512, heads of 64": Rows(1, 8192, head_dim=64, document=512),
    "1 x 32768 in documents of 4096, heads of 64": Rows(1, 32768, head_dim=64, document=4096),
    "1 x 8192 in documents of 512, heads of 256": Rows(1, 8192, 16, 8, 256, document=512),
    "1 x 32768 in documents of 4096, heads of 256": Rows(1, 32768, 16, 8, 256, document=4096),
    "images of 1024 patches, heads of 72": Rows(1, 8192, 16, 16, 72, document=1024, causal=False),
    "images of 4096 patches, heads of 80": Rows(1, 16384, 16, 16, 80, document=4096, causal=False),
    "4 x 2048, soft cap, heads of 256": Rows(4, 2048, 16, 8, 256, softcap=50.0),
    "1 x 8192, window of 4096, soft cap, heads of 256": Rows(1, 8192, 16, 8, 256, window=4096, softcap=50.0),
}


def measure(rows: Rows, backend: str, device: str) -> dict[str, Any]:
    """Times and rates of one kernel."""
    import torch

    from fastllm.kernels.attention import AttentionCase, attention_backward, attention_forward
    from fastllm.kernels.documents import Documents

    def heads(count: int) -> torch.Tensor:
        shape = rows.batch, rows.sequence, count, rows.head_dim
        return torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v, dout = map(heads, (rows.heads, rows.key_value_heads, rows.key_value_heads, rows.heads))
    documents = None
    if rows.document:
        positions = (torch.arange(rows.sequence) % rows.document).expand(rows.batch, -1)
        documents = Documents.from_position_ids(positions.to(device), rows.batch)
    case = AttentionCase(
        rows.head_dim**-0.5, documents=documents, sliding_window=rows.window, softcap=rows.softcap, causal=rows.causal
    )

    def forward() -> Any:
        return attention_forward(q, k, v, case, backend, needs_backward=True)

    result = forward()
    saved = result.saved

    def backward() -> None:
        result.saved = saved
        attention_backward(result, dout, q, k, v, case)

    seconds = measured_seconds(forward, MANY_CALLS), measured_seconds(backward, MANY_CALLS)
    flops = 4 * rows.head_dim * rows.heads * rows.pairs
    return {
        "forward_us": round(1e6 * seconds[0], 1), "backward_us": round(1e6 * seconds[1], 1),
        "forward_tflops": round(flops / seconds[0] / 1e12, 1),
        "backward_tflops": round(2.5 * flops / seconds[1] / 1e12, 1),
    }  # fmt: skip


def serves(rows: Rows, backend: str) -> bool:
    """Whether a kernel computes this case: torch's know no soft cap, and only `varlen` documents and windows."""
    is_narrowed = bool(rows.document or rows.window)
    if rows.softcap:
        return backend == "triton"
    return backend in (("triton", "varlen") if is_narrowed else BACKENDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/attention_<gpu>.json)")
    parser.add_argument("--commit", help="of these files, where they were copied here without their history")
    options = parser.parse_args()
    there = machine()
    if there["gpu"] == "none":
        raise SystemExit("attention is measured on a GPU, and there is none")
    results = []
    for name, rows in CASES.items():
        for backend in BACKENDS:
            if serves(rows, backend):
                try:
                    found = measure(rows, backend, "cuda")
                except RuntimeError as error:
                    found = {"error": str(error).splitlines()[0]}
                results.append({"case": name, "kernel": backend, **found})
                print(f"{name:50} {backend:10}", found, flush=True)
    out = options.out or ROOT / f"benchmarks/results/attention_{there['gpu'].lower().replace(' ', '_')}.json"
    session = environment(options.commit, there, "attention")
    out.write_text(json.dumps({**session, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
