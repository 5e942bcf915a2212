"""Compiles every Triton kernel for one GPU target on a machine without a GPU, and prints what came out as JSON.

Usage: python -m tests.kernels.ahead_of_time sm_90

The public ops run on CPU tensors as they would on a GPU, with the shapes of real models, under a driver that names the
target; each launch is compiled with the arguments and options it came with, and not executed.
"""

import functools
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastllm.kernels
from fastllm.kernels import adam_8bit, dispatch, fp8_head
from fastllm.kernels import glu_lora_backward as glu_lora
from fastllm.kernels.activation import ACTIVATIONS, activation, activation_backward
from fastllm.kernels.copy_lora import copy_with_product
from fastllm.kernels.dispatch import backend
from fastllm.kernels.documents import Documents
from fastllm.kernels.flash_attention import MAX_HEAD_DIM, flash_attention_backward, flash_attention_forward
from fastllm.kernels.fp8 import CAPABILITY, Fp8Matrix, Fp8Weight, quantize_weight
from fastllm.kernels.fp8_low_rank import Term, fp8_input_grad, fp8_linear
from fastllm.kernels.glu import glu, glu_backward
from fastllm.kernels.glu_lora_forward import glu_lora_forward
from fastllm.kernels.host_rows import read_rows
from fastllm.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward
from fastllm.kernels.linear_cross_entropy import LogitTransform, linear_cross_entropy, linear_token_losses
from fastllm.kernels.lora import Projection, ProjectionGroup, project_group
from fastllm.kernels.nf4 import Nf4Weight, dequantize_nf4
from fastllm.kernels.part_sums import PartSum, add_up
from fastllm.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from fastllm.kernels.rope import rope
from fastllm.kernels.row_copy import copy_rows

TARGETS = {
    **{f"sm_{c}": GPUTarget("cuda", c, 32) for c in (75, 80, 86, 89, 90, 100)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROWS = 3
# Modules whose kernels need tensor cores; nothing launches them on a GPU for which Triton has none.
NEED_TENSOR_CORES = {
    f"fastllm.kernels.{name}"
    for name in (
        "copy_lora", "flash_attention", "flash_attention_kernels", "glu_lora_backward", "glu_lora_forward",
        "tensor_tiles",
    )
}  # fmt: skip
# The same of FP8.
NEED_FP8 = {f"fastllm.kernels.{name}" for name in ("fp8", "fp8_head", "fp8_low_rank")}


class TargetDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def most_demanding(choices: Iterable[Any], dtype: torch.dtype) -> list[Any]:
    """All of the choices for the dtype that models are trained in; in fp32 the last, which takes the most registers."""
    return list(choices) if dtype.itemsize == 2 else list(choices)[-1:]


def launches(dtype: torch.dtype) -> None:
    """Every kernel with each of its compile-time options, at widths of models from 1B to 70B parameters."""
    new = functools.partial(torch.randn, dtype=dtype)
    for width in most_demanding((128, 4096, 8192), dtype):  # 128: the norms of heads
        x, weight = new(ROWS, width, requires_grad=True), new(width, requires_grad=True)
        rms_norm(x, weight, 1e-5).sum().backward()
        _, total, rstd = rms_norm_forward(x.detach(), weight.detach(), 1e-5, residual=new(ROWS, width))
        rms_norm_backward(new(ROWS, width), total, weight.detach(), rstd, 1e-5, residual_grad=new(ROWS, width))
    for width in most_demanding((1152, 4096), dtype):  # of vision towers
        x, weight, bias = (new(*shape, requires_grad=True) for shape in ((ROWS, width), (width,), (width,)))
        layer_norm(x, weight, bias, 1e-6).sum().backward()
        given = (weight.detach(), bias.detach())
        _, total, *statistics = layer_norm_forward(x.detach(), *given, 1e-6, residual=new(ROWS, width))
        layer_norm_backward(new(ROWS, width), total, given[0], *statistics, 1e-6, residual_grad=new(ROWS, width))
    for head_dim, rotary_dim in most_demanding(((64, 64), (80, 32), (128, 128), (256, 256)), dtype):
        q, k = new(1, 32, ROWS, head_dim, requires_grad=True), new(1, 8, ROWS, head_dim, requires_grad=True)
        sum(y.sum() for y in rope(q, k, new(1, ROWS, rotary_dim), new(1, ROWS, rotary_dim))).backward()
    for name in most_demanding(sorted(ACTIVATIONS, key="gelu".__eq__), dtype):
        gate, up = (new(ROWS, 14336, requires_grad=True) for _ in range(2))
        glu(gate, up, name).sum().backward()
        gate, up, dh = (new(ROWS, 14336) for _ in range(3))
        glu_backward(dh, gate, up, name, gate, up, h_out=dh)
        activation(new(ROWS, 5120, requires_grad=True), name).sum().backward()
        activation_backward(dh, gate, name, gate, y_out=dh)
    for is_nested in (False, True):
        dequantize_nf4(quantized(256, 4096, is_nested=is_nested), dtype)
    for width in (2304, 4096):
        read_rows(new(ROWS, width), torch.arange(ROWS))
        copy_rows(new(ROWS, width + 16)[:, :width], new(ROWS, width))
    for columns in (32, 48):
        sums = [PartSum(new(ROWS, 16), first) for first in range(0, columns, 16)]
        add_up(torch.zeros(5, ROWS, columns), sums)
    for weight_decay in (0.0, 0.1):
        p, g, codes = new(ROWS, 2048), new(ROWS, 2048), torch.zeros(2, ROWS, 2048, dtype=torch.uint8)
        settings = {"step": 3, "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": weight_decay}
        adam_8bit.adam_8bit(p, g, tuple(codes), tuple(torch.zeros(2, ROWS * 8)), torch.zeros(4, 256), **settings)
    x = new(ROWS, 4096)
    for count in (1, 2, 3):
        projections = [Projection(new(256, 4096), None, new(16, 4096), new(256, 16), 2.0) for _ in range(count)]
        project_group(x, ProjectionGroup(projections))
    hidden, labels = new(ROWS, 64, requires_grad=True), torch.arange(ROWS)
    head = ProjectionGroup([Projection(new(128256, 64, requires_grad=True))])
    for transform in (LogitTransform(), LogitTransform(0.5, 30.0)):
        linear_cross_entropy(hidden, head, labels, transform=transform).backward()
        linear_token_losses(hidden, head, labels, transform=transform).nll.sum().backward()
        linear_token_losses(hidden.detach(), head, labels, transform=transform, statistics=("entropy", "is_top1"))


def fp8_launches(dtype: torch.dtype) -> None:
    """Products of weights as wide as projections are, alone and joined, with adapters and without."""
    new = functools.partial(torch.randn, dtype=dtype)
    for columns in most_demanding((1024, 4096, 28672), dtype):
        for rank in (0, 48):
            weight = Fp8Weight(Fp8Matrix.empty(64, columns, torch.device("cpu"), rank=rank))
            quantize_weight(new(64, columns), out=weight.by_output)
            fp8_linear(new(ROWS, columns), weight, Term(new(ROWS, rank), new(64, rank)) if rank else None)
            fp8_input_grad(new(ROWS, 64), weight, Term(new(ROWS, rank), new(columns, rank)) if rank else None)
    fp8_head._LEAST_ROWS = 1
    head = ProjectionGroup([Projection(new(128256, 64))])
    for transform in (LogitTransform(), LogitTransform(0.5, 30.0)):
        hidden = new(ROWS, 64, requires_grad=True)
        linear_cross_entropy(hidden, head, torch.arange(ROWS), transform=transform, fp8_gradient=True)


def tensor_core_launches(dtype: torch.dtype) -> None:
    """Heads of every size served, with all that takes registers: packed documents, windows, capped scores."""
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 0]]), 1)
    everything = {"documents": documents, "softcap": 50.0, "window": 2}
    for width in (width for width in (64, 128, 256) if width <= MAX_HEAD_DIM[dtype]):
        q, k, v = (torch.randn(1, ROWS, heads, width, dtype=dtype).transpose(1, 2) for heads in (8, 2, 2))
        for case in most_demanding(({"documents": documents}, everything), dtype):
            out, lse = flash_attention_forward(q, k, v, scaling=0.1, **case)
            flash_attention_backward(out, out, lse, q, k, v, scaling=0.1, **case)
    for rank in (16, 32):
        h, low_rank = torch.randn(ROWS, 14336, dtype=dtype), torch.randn(ROWS, 64, dtype=dtype)
        glu_lora_forward(h, h, "gelu", torch.randn(64, 14336, dtype=dtype), rank, out=h, low_rank=low_rank)
    for rank in (16, 32, 64):
        for x_dtype in {dtype, torch.float32}:
            x = torch.randn(ROWS, 4096, dtype=x_dtype)
            wide, a = torch.randn(ROWS, 4096 + 64, dtype=dtype), torch.randn(64, 4096, dtype=dtype)
            given = {"out": wide[:, :4096], "low_rank": wide[:, 4096:], "kept": torch.randn(ROWS, 64, dtype=dtype)}
            copy_with_product(x, a, rank, **given)
    rank = glu_lora.MAX_RANK
    rows = 8192  # as many as make the program go from strip to strip
    h, gate, up = (torch.empty(rows, 14336, dtype=dtype) for _ in range(3))
    left, b, a = (torch.empty(*shape, dtype=dtype) for shape in ((rows, rank), (14336, rank), (rank, 14336)))
    around = [glu_lora.Narrow(left, b.float(), left)] * 2
    for last, name in itertools.product((glu_lora.Narrow(left), glu_lora.Narrow(left, a.t(), left)), ("silu", "gelu")):
        glu_lora.glu_lora_backward(h, gate, up, name, gate, up, narrow=[*around, last])
    images = {"documents": documents, "causal": False}
    for width in (64, 128):  # of vision towers
        q, k, v = (torch.randn(1, ROWS, 2, width, dtype=dtype).transpose(1, 2) for _ in range(3))
        out, lse = flash_attention_forward(q, k, v, scaling=0.1, **images)
        flash_attention_backward(out, out, lse, q, k, v, scaling=0.1, **images)


def quantized(rows: int, columns: int, *, is_nested: bool) -> Nf4Weight:
    blocks = rows * columns // 64
    packed, code = torch.zeros(rows * columns // 2, dtype=torch.uint8), torch.ones(16)
    if not is_nested:
        return Nf4Weight(packed, torch.ones(blocks), code, (rows, columns), 64)
    absmax, nested = torch.zeros(blocks, dtype=torch.uint8), torch.ones(-(-blocks // 256))
    return Nf4Weight(packed, absmax, code, (rows, columns), 64, nested, torch.ones(256), torch.zeros(()))


def has_tensor_cores(target: GPUTarget) -> bool:
    """Whether Triton has any for the target."""
    return target.backend == "hip" or target.arch >= 80


def has_fp8(target: GPUTarget) -> bool:
    """Whether torch has row-wise scaled products in FP8 for the target."""
    major, minor = CAPABILITY
    return target.backend == "cuda" and target.arch >= 10 * major + minor


def kernels_of_the_package(target: GPUTarget) -> Iterator[JITFunction]:
    """Every `@jit` function that is launched; those called from others are compiled inside them."""
    found = []
    for info in pkgutil.iter_modules(fastllm.kernels.__path__, "fastllm.kernels."):
        if info.name in NEED_TENSOR_CORES and not has_tensor_cores(target):
            continue
        if info.name in NEED_FP8 and not has_fp8(target):
            continue
        found += [v for v in vars(importlib.import_module(info.name)).values() if isinstance(v, JITFunction)]
    called = {name for kernel in found for name in kernel.fn.__code__.co_names}
    return (kernel for kernel in found if kernel.fn.__name__ not in called)


def facts_of(name: str, kernel: "triton.compiler.CompiledKernel") -> dict:
    """What a target's limits are about."""
    return {
        "kernel": name,
        "shared": kernel.metadata.shared,
        "spilled": spilled_bytes(kernel),
        "has_dot": "tt.dot" in kernel.asm["ttgir"],
    }


def spilled_bytes(kernel: "triton.compiler.CompiledKernel") -> int:
    """Bytes of local memory a thread, by the assembler's own account."""
    if "amdgcn" in kernel.asm:
        account, entry = kernel.asm["amdgcn"], r"\.private_segment_fixed_size:\s+(\d+)"
    else:
        entry = r"(?:STACK|LOCAL):(\d+)"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            account = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(entry, account)
    if not found:
        raise RuntimeError(f"no account of local memory in:\n{account}")
    return sum(map(int, found))


def main(target: GPUTarget) -> None:
    compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, warmup: bool, **kwargs) -> None:
        compiled.append((self.fn.__name__, run(self, *args, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(TargetDriver(target))
    glu_lora._programs = lambda tiling, device: int(132 * tiling.programs)
    capability = divmod(target.arch, 10) if target.backend == "cuda" else (0, 0)
    dispatch.info_of = lambda device: SimpleNamespace(capability=capability)
    if target.backend == "hip":
        torch.version.hip = "as on the target"
    with backend("triton"):
        for dtype in (torch.bfloat16 if has_tensor_cores(target) else torch.float16, torch.float32):
            launches(dtype)
            if has_tensor_cores(target):
                tensor_core_launches(dtype)
            if has_fp8(target):
                fp8_launches(dtype)
    unique = {id(kernel): (name, kernel) for name, kernel in compiled}
    json.dump(
        {
            "kernels": sorted(kernel.fn.__name__ for kernel in kernels_of_the_package(target)),
            "compiled": [facts_of(name, kernel) for name, kernel in unique.values()],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(TARGETS[sys.argv[1]])
