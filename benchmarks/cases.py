"""What is measured: the cases, and the plans that put them in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

TEXT_PEERS = ("fastllm", "unsloth", "liger", "hf")
WAYS = ("default", "none", "least", "fp8")
# The ways of holding activations that each peer has: the least memory, no recomputation, and what is used when nothing
# is asked for. A way whose setting is that of another is measured once.
CHECKPOINTING: dict[str, dict[str, bool | str]] = {
    "hf": {"least": True, "none": False},
    "liger": {"least": True, "none": False},
    "unsloth": {"least": "unsloth", "none": False},
    "fastllm": {"least": "offload", "none": False, "default": "fastllm", "fp8": "fastllm"},
}
# What a way asks of `from_pretrained` besides. FP8 changes the results: it is a way of its own.
LOADING: dict[tuple[str, str], dict[str, bool]] = {
    ("fastllm", "least"): {"offload_embedding": True},
    ("fastllm", "fp8"): {"fp8_compute": True},
}
# What a user of each library gets who asks for nothing; those of Hugging Face leave the choice to their users.
DEFAULT_WAY = {"fastllm": "default", "unsloth": "least"}


@dataclass(frozen=True)
class Case:
    """One training setting. `bits` of the base: 4 (NF4), 16, or 0 for full fine-tuning; `rank` is LoRA's.

    `images` gives each sample that many patches of an image. `memory_gib` is all that the process may take of the GPU.
    `held_to` names an older GPU whose limits are kept (older_gpus.py): its memory, and fp16 where it has no bf16.
    `from_start` counts the memory peak from the start of the process, loading included; elsewhere the peak is that of
    training, after a reset, and the peak of loading stands beside it. With `trainer` the steps are those of TRL's
    SFTTrainer, elsewhere of a plain loop. `document` is the mean length of documents that the trainer packs into rows
    of `sequence` tokens (0: every row is one). `seconds` is a generous guess of what a measurement takes on an H200, by
    which a session chooses what still fits into its time.
    """

    model: str
    bits: int = 4
    batch: int = 4
    sequence: int = 2048
    accumulate: int = 1
    rank: int = 16
    images: int = 0
    memory_gib: float = 0.0
    held_to: str = ""
    from_start: bool = False
    trainer: bool = False
    document: int = 0
    warmup: int = 3
    steps: int = 10
    seconds: int = 60

    @property
    def dtype(self) -> str:
        return "float16" if self.held_to else "bfloat16"

    @property
    def has_floor(self) -> bool:
        """Whether the floor of its step is of interest, and known: attention of packed documents has none."""
        return not self.from_start and not self.document

    @property
    def work(self) -> tuple:
        """What decides the arithmetic of a step: cases that agree in it have one limit."""
        return (
            self.model, self.bits, self.batch, self.sequence, self.accumulate, self.images, self.trainer, self.document,
        )  # fmt: skip


CASES: dict[str, Case] = {
    "qlora-8b": Case("llama-3.1-8b"),
    "qlora-8b-short": Case("llama-3.1-8b", batch=1, sequence=512, accumulate=4, trainer=True, steps=20),
    "qlora-8b-packed": Case("llama-3.1-8b", batch=1, sequence=8192, trainer=True, document=512, seconds=90),
    "qlora-8b-32k": Case("llama-3.1-8b", batch=1, sequence=32768, warmup=2, steps=5, seconds=110),
    "qlora-8b-128k": Case("llama-3.1-8b", batch=1, sequence=131072, warmup=1, steps=2, seconds=260),
    "qlora-8b-64k-24g": Case("llama-3.1-8b", batch=1, sequence=65536, memory_gib=24, warmup=1, steps=2, seconds=120),
    "qlora-8b-12g": Case("llama-3.1-8b", memory_gib=12),
    "qlora-8b-16g": Case("llama-3.1-8b", memory_gib=16),
    "qlora-8b-24g": Case("llama-3.1-8b", memory_gib=24),
    "lora-8b": Case("llama-3.1-8b", bits=16),
    "full-1b": Case("llama-3.2-1b", bits=0),
    "floor-7b": Case("llama-2-7b", batch=1, sequence=512, from_start=True),
    "floor-13b": Case("llama-2-13b", batch=1, sequence=512, from_start=True, seconds=80),
    "floor-gemma-9b": Case("gemma-2-9b", batch=1, sequence=512, from_start=True, seconds=80),
    "vl-7b": Case("qwen2.5-vl-7b", batch=1, sequence=195, rank=8, images=320, steps=20, seconds=70),
    "vl-7b-batch-8": Case("qwen2.5-vl-7b", batch=8, sequence=195, rank=8, images=320, steps=20, seconds=70),
    "vl-7b-t4": Case(
        "qwen2.5-vl-7b", batch=1, sequence=195, accumulate=4, rank=8, images=320, held_to="t4", from_start=True
    ),
    "smoke": Case("toy", batch=1, sequence=64, warmup=1, steps=2, seconds=1),
    "smoke-trainer": Case("toy", batch=1, sequence=64, accumulate=4, trainer=True, warmup=1, steps=2, seconds=1),
    "smoke-packed": Case("toy", batch=1, sequence=64, trainer=True, document=16, warmup=1, steps=2, seconds=1),
    "smoke-vl": Case("toy-vl", batch=2, sequence=45, rank=8, images=32, warmup=1, steps=2, seconds=1),
}


class Step(NamedTuple):
    """One entry of a plan: a measurement of a case by a peer in one way, or its `limits`, or a loss curve."""

    kind: str  # "measure", "limits" or "curve"
    case: str
    peer: str = ""
    way: str = ""


CURVES = ("bfloat16", "float16", "float32", "fp8")
# name -> (case, ways) in the order of their worth; a session takes them from the top while its time lasts. Cases of one
# model follow each other, so that its checkpoint is made once.
PLANS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "all": (
        ("qlora-8b", WAYS),
        ("qlora-8b-24g", ("default", "least")),
        ("qlora-8b-short", ("default", "least")),
        ("qlora-8b-packed", ("default", "least")),
        ("qlora-8b-32k", ("default", "least")),
        ("qlora-8b-16g", ("default",)),
        ("qlora-8b-12g", ("default",)),
        ("lora-8b", ("default", "least")),
        ("vl-7b", ("default", "least")),
        ("vl-7b-batch-8", ("default", "least")),
        ("vl-7b-t4", ("default", "least")),
        ("floor-7b", ("least",)),
        ("floor-13b", ("least",)),
        ("floor-gemma-9b", ("least",)),
        ("curves", CURVES),
        ("full-1b", ("default", "least")),
        ("qlora-8b-64k-24g", ("least",)),
        ("qlora-8b-128k", ("least",)),
    ),
    "speed": (("qlora-8b", WAYS), ("qlora-8b-short", ("default", "least")), ("lora-8b", WAYS), ("full-1b", WAYS)),
    "memory": (
        ("floor-7b", ("least",)),
        ("floor-13b", ("least",)),
        ("floor-gemma-9b", ("least",)),
        ("vl-7b-t4", ("default", "least")),
        ("qlora-8b-24g", ("default", "least")),
        ("qlora-8b-16g", ("default",)),
        ("qlora-8b-12g", ("default",)),
    ),
    "long": (("qlora-8b-32k", ("default", "least")), ("qlora-8b-64k-24g", ("least",)), ("qlora-8b-128k", ("least",))),
    "vision": (("vl-7b", ("default", "least")), ("vl-7b-batch-8", ("default", "least"))),
    "curves": (("curves", CURVES),),
    "smoke": (
        ("smoke", ("default", "none", "least")),
        ("smoke-trainer", ("default", "none", "least")),
        ("smoke-packed", ("least",)),
        ("smoke-vl", ("least",)),
        ("curves", ("bfloat16",)),
    ),
}
# Loss curves are of these two: the question is whether the fused layers train as plain transformers and PEFT do. FP8,
# which they have not, is drawn beside their bf16.
CURVE_PEERS = dict.fromkeys(CURVES, ("hf", "fastllm")) | {"fp8": ("fastllm",)}


def steps(rows: Iterable[tuple[str, tuple[str, ...]]], peers: Iterable[str]) -> Iterator[Step]:
    """The entries of a plan for these peers: of each case its limits, once for cases of the same work and not where
    memory alone is of interest, and then what its peers do, in their order."""
    peers, limited = list(peers), set()
    for case, ways in rows:
        if case == "curves":
            yield from (Step("curve", case, peer, way) for way in ways for peer in CURVE_PEERS[way] if peer in peers)
            continue
        if CASES[case].has_floor and CASES[case].work not in limited:
            limited.add(CASES[case].work)
            yield Step("limits", case)
        yield from (Step("measure", case, peer, way) for peer in peers for way in ways if way in CHECKPOINTING[peer])
