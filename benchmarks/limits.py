"""How fast a step could be: the time of the matrix products and the attention that no implementation can leave out.

The floor of a step is the sum, at the rates that torch's own libraries reach on this GPU, of

- the base products of each layer, forward and for the gradient of their input (and of the weight in full fine-tuning),
- attention, forward and backward, by the fastest kernel of torch's that takes it (causal; a soft cap is left out),
- the head, forward and backward,

with nothing for LoRA, 4-bit weights, norms, activations, the loss, the optimiser and the host. Where activations are
recomputed from each layer's input, the forward comes once more without `down_proj`: nothing needs its result again.
Each rate is of a product that runs alone on a rested GPU, with weights that are joined where that is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import CASES, Case
from .models import config
from .training import MERGE

# Seconds of calls between two readings where the host takes long for a call: so many that the first one's way through
# it does not count.
MANY_CALLS = 30e-3
# Rates no longer change with more rows than this; longer products are measured at it and scaled.
MAX_ROWS = 16384


@dataclass(frozen=True)
class Products:
    """Products that share their input: `x [rows, inputs]` with a weight `[outputs, inputs]` for each of `outputs`."""

    name: str
    rows: int
    inputs: int
    outputs: tuple[int, ...]
    layers: int
    recomputed: bool = True

    @property
    def flops(self) -> int:
        """Of one pass through one layer."""
        return 2 * self.rows * self.inputs * sum(self.outputs)


@dataclass(frozen=True)
class Attention:
    """Causal attention of one layer."""

    batch: int
    sequence: int
    heads: int
    key_value_heads: int
    head_dim: int
    layers: int

    @property
    def flops(self) -> int:
        """Of one forward: two products of half the score matrix. A backward has two and a half times as many."""
        return 2 * self.batch * self.heads * self.sequence**2 * self.head_dim


def work(case: Case) -> tuple[list[Products], Attention]:
    """The products and the attention of one forward of a batch."""
    whole = config(case.model)
    text = getattr(whole, "text_config", whole)
    rows, width, inner = case.batch * case.sequence, text.hidden_size, text.intermediate_size
    heads, pairs = text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    layers = text.num_hidden_layers
    products = [
        Products("qkv", rows, width, (heads * head_dim, pairs * head_dim, pairs * head_dim), layers),
        Products("o", rows, heads * head_dim, (width,), layers),
        Products("gate_up", rows, width, (inner, inner), layers),
        Products("down", rows, inner, (width,), layers, recomputed=False),
        Products("head", rows, width, (text.vocab_size,), 1, recomputed=False),
    ]
    if case.images:
        tower = whole.vision_config
        patches, width, inner = case.batch * case.images, tower.hidden_size, tower.intermediate_size
        products += [
            Products("vision qkv", patches, width, (3 * width,), tower.depth),
            Products("vision o", patches, width, (width,), tower.depth),
            Products("vision gate_up", patches, width, (inner, inner), tower.depth),
            Products("vision down", patches, inner, (width,), tower.depth, recomputed=False),
            Products("vision merger", patches // MERGE**2, width * MERGE**2, (width * MERGE**2,), 1),
        ]
    return products, Attention(case.batch, case.sequence, heads, pairs, head_dim, layers)


def floor(
    case: Case,
    product_seconds: Callable[[str, int, int, int], float],
    attention_seconds: Callable[[Attention], tuple[float, float]],
) -> dict[str, Any]:
    """The floor of a step of the case, and its parts.

    `product_seconds(kind, rows, inputs, outputs)` is the time of one product of `kind` "forward", "dx" or "dw";
    `attention_seconds(attention)` that of one layer's forward and backward. Accumulated batches of a trainer count as
    one, which is faster: nothing keeps a library from joining them.
    """
    if case.trainer:
        case = dataclasses.replace(case, batch=case.batch * case.accumulate, accumulate=1)
    products, attention = work(case)
    kinds = ("forward", "dx") if case.bits else ("forward", "dx", "dw")
    parts, passes, recomputed, flops = [], 0.0, 0.0, 0
    for group in products:
        times = {}
        for kind in kinds:
            one_by_one = sum(product_seconds(kind, group.rows, group.inputs, n) for n in group.outputs)
            joined = product_seconds(kind, group.rows, group.inputs, sum(group.outputs))
            times[kind] = min(one_by_one, joined)
        passes += group.layers * sum(times.values())
        recomputed += group.layers * times["forward"] * group.recomputed
        flops += group.layers * group.flops * len(kinds)
        parts.append({
            "name": group.name, "rows": group.rows, "inputs": group.inputs, "outputs": list(group.outputs),
            "layers": group.layers, **{f"{kind}_us": round(1e6 * value, 1) for kind, value in times.items()},
            "tflops": round(len(kinds) * group.flops / sum(times.values()) / 1e12, 1),
        })  # fmt: skip
    forward, backward = attention_seconds(attention)
    attended = attention.layers * (forward + backward)
    recomputed += attention.layers * forward
    flops += round(attention.layers * 3.5 * attention.flops)
    total = case.accumulate * (passes + attended)
    return {
        "floor_s": total, "floor_recompute_s": total + case.accumulate * recomputed,
        "products_s": case.accumulate * passes, "attention_s": case.accumulate * attended,
        "attention_forward_us": round(1e6 * forward, 1), "attention_backward_us": round(1e6 * backward, 1),
        "flops": case.accumulate * flops, "products": parts,
    }  # fmt: skip


def shares(result: dict[str, Any], limit: dict[str, Any]) -> dict[str, float]:
    """The part of a measured step that its floor is: without recomputation, and with."""
    return {
        "of_floor": round(limit["floor_s"] / result["step_s"], 3),
        "of_floor_recompute": round(limit["floor_recompute_s"] / result["step_s"], 3),
    }


def measured_seconds(function: Callable[[], Any], window: float = 2e-3) -> float:
    """The median time of a call, from several runs of about `window` seconds, long enough to time."""
    import torch

    def run(calls: int) -> float:
        if not torch.cuda.is_available():
            started = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - started) / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    run(1)
    once = run(1)
    calls = max(1, min(200, int(window / once)))
    repeats = max(3, min(30, int(0.1 / (once * calls))))
    return statistics.median(run(calls) for _ in range(repeats))


def measured_product(kind: str, rows: int, inputs: int, outputs: int) -> float:
    import torch

    measured = min(rows, MAX_ROWS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(measured, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    dy = torch.randn(measured, outputs, device=device, dtype=torch.bfloat16)
    run = {"forward": lambda: x @ weight.T, "dx": lambda: dy @ weight, "dw": lambda: dy.T @ x}[kind]
    return measured_seconds(run) * rows / measured


def measured_attention(attention: Attention) -> tuple[float, float]:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def heads(count: int) -> torch.Tensor:
        """[B, heads, S, E], laid out as projections give it."""
        size = (attention.batch, attention.sequence, count, attention.head_dim)
        return torch.randn(size, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()

    q, k, v = heads(attention.heads), heads(attention.key_value_heads), heads(attention.key_value_heads)
    shared = attention.heads != attention.key_value_heads
    gradient = torch.randn_like(q)
    best = (float("inf"), float("inf"))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in backends if device == "cuda" else [SDPBackend.MATH]:
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
                with torch.no_grad():
                    forward = measured_seconds(
                        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared), MANY_CALLS
                    )
                backward = measured_seconds(
                    lambda out=out: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), MANY_CALLS
                )
        except RuntimeError:  # this kernel does not take these shapes
            continue
        best = min(best, (forward, backward), key=sum)
    if best[0] == float("inf"):
        raise RuntimeError(f"no attention kernel of torch's takes {attention}")
    return best


def machine() -> dict[str, Any]:
    """The GPU, and its rates in this session: a large bf16 product and a large copy."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": "none", "cuda": None, "ceilings": {}}
    seconds = measured_product("forward", 8192, 8192, 8192)
    source = torch.empty(2**29, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copied = measured_seconds(lambda: target.copy_(source))
    return {
        "gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "ceilings": {
            "gemm_tflops": round(2 * 8192**3 / seconds / 1e12),
            "copy_tb_s": round(2 * source.nbytes / copied / 1e12, 2),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="without it: the GPU and its rates")
    options = parser.parse_args()
    case = CASES.get(options.case)
    found = floor(case, measured_product, measured_attention) if case else machine()
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
