"""Where the time of one step goes, by class of kernel, from torch's profiler.

On a GPU the slices of time are its kernels and copies; on a CPU they are torch's own operators.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

# A product with a dimension of at most this is a side product of LoRA: three stacked adapters of rank 16 have 48, and
# no layer and no batch of the cases is as narrow.
LORA_WIDTH = 64
# The first pattern that the lower-case name of a kernel matches says what it is.
CLASSES = (
    ("optimizer", r"optimizer|adam|multi_tensor_apply"),
    ("attention", r"flash|fmha|attention|sdpa|_attn|cudnn_generated|mha_"),
    ("dequantize", r"dequantize|kgemm_4bit|nf4"),
    ("loss", r"cross_entropy|softmax|logsumexp|nll_loss"),
    ("lora", r"low_rank|lora"),
    ("gemm", r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk|aten::(add|ba|b)?mm|aten::(linear|matmul)"),
    ("copies", r"memcpy|memset|copy|cat_|catarray|aten::(cat|copy_|clone|to)$"),
    ("elementwise", r"norm|glu|silu|rope|rotary|elementwise|vectorized|reduce|triton_|aten::"),
)


class Slice(NamedTuple):
    """A kernel's run in microseconds; `narrowest` is the least dimension of a product."""

    name: str
    start: float
    end: float
    narrowest: int | None = None


def class_of(slice_: Slice) -> str:
    name = slice_.name.lower()
    found = next((kind for kind, pattern in CLASSES if re.search(pattern, name)), "other")
    if found == "gemm" and slice_.narrowest is not None and slice_.narrowest <= LORA_WIDTH:
        return "lora"
    return found


def breakdown(slices: Iterable[Slice], longest: int = 15) -> dict[str, Any]:
    """Milliseconds of each class, the gaps in which nothing runs, the kernels that take longest and the longest gaps.

    Slices that run at once (copies beside products) are counted in full in their classes; `busy_ms` counts them once.
    """
    slices = sorted(slices, key=lambda one: one.start)
    if not slices:
        return {"span_ms": 0.0, "busy_ms": 0.0, "gaps_ms": 0.0, "classes_ms": {}, "kernels": [], "gaps": []}
    classes: Counter[str] = Counter()
    names: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    busy, until, last = 0.0, slices[0].start, slices[0]
    gaps: list[tuple[float, str, str]] = []
    for one in slices:
        kind = class_of(one)
        label = f"{kind}: {one.name[:70]}"
        classes[kind] += one.end - one.start
        names[label] += one.end - one.start
        calls[label] += 1
        busy += max(0.0, one.end - max(one.start, until))
        if one.start > until:
            gaps.append((one.start - until, last.name[:70], one.name[:70]))
        if one.end >= until:
            until, last = one.end, one
    span = until - slices[0].start
    return {
        "span_ms": round(span / 1e3, 2), "busy_ms": round(busy / 1e3, 2), "gaps_ms": round((span - busy) / 1e3, 2),
        "classes_ms": {kind: round(value / 1e3, 2) for kind, value in classes.most_common()},
        "kernels": [
            {"name": label, "ms": round(value / 1e3, 2), "calls": calls[label]}
            for label, value in names.most_common(longest)
        ],
        "gaps": [
            {"ms": round(length / 1e3, 2), "after": before, "until": after}
            for length, before, after in sorted(gaps, reverse=True)[:5]
        ],
    }  # fmt: skip


@contextmanager
def profiled(found: dict[str, Any]) -> Iterator[None]:
    """Put the breakdown of what runs inside into `found`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, record_shapes=True) as profiler:
        yield
        if on_gpu:
            torch.cuda.synchronize()
    found.update(breakdown(slices_of(profiler.events(), on_gpu)))


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """The breakdown of one call of `step`, or why there is none."""
    found: dict[str, Any] = {}
    try:
        with profiled(found):
            step()
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return found


def slices_of(events: Any, on_gpu: bool) -> Iterable[Slice]:
    """The slices of a profile. Kernels take the shapes of the operator that launched them."""
    from torch.autograd import DeviceType

    operators = [event for event in events if event.device_type == DeviceType.CPU]
    if not on_gpu:
        for event in operators:
            inside = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
            if event.name.startswith("aten::") and not inside:
                yield Slice(event.name, event.time_range.start, event.time_range.end, _narrowest(event))
        return
    # An operator knows the names and durations of its kernels, which find their runs.
    widths: dict[tuple[str, float], list[int | None]] = {}
    for event in operators:
        for kernel in event.kernels:
            widths.setdefault((kernel.name, kernel.duration), []).append(_narrowest(event))
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            start, end = event.time_range.start, event.time_range.end
            found = widths.get((event.name, end - start))
            yield Slice(event.name, start, end, found.pop(0) if found else None)


def _narrowest(event: Any) -> int | None:
    """The least dimension of a product of two matrices."""
    matrices = [shape for shape in event.input_shapes if len(shape) == 2]
    if event.name not in ("aten::mm", "aten::addmm") or len(matrices) < 2:
        return None
    return min(*matrices[-2], *matrices[-1])
