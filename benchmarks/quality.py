"""The loss curve of one library: QLoRA of a small Llama, with the same data, order and starting adapters for each.

The base is trained in full by a plain loop on the sources of Python's standard library, in fp32; the adapters then
learn the sources of one package that it has not read. Everything is made on the spot, from what every machine has.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import CURVES

HELD_OUT = "asyncio"
_DONE = "base.done"


@dataclass(frozen=True)
class Size:
    """The base model, its training, and the training of the adapters."""

    width: int
    layers: int
    vocabulary: int
    base_steps: int
    steps: int
    batch: int
    sequence: int
    characters: int


SIZES = {
    "small": Size(512, 8, 4096, 600, 200, 8, 512, 8_000_000),
    "toy": Size(64, 2, 512, 4, 3, 2, 32, 60_000),
}


def sources(characters: int) -> tuple[str, str]:
    """The sources of the standard library's top modules, and those of the package that the base does not read."""
    library = Path(sysconfig.get_paths()["stdlib"])
    read = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py")))
    held_out = (library / HELD_OUT).glob("*.py")
    return read[:characters], "\n".join(path.read_text(encoding="utf-8") for path in sorted(held_out))[:characters]


def make_base(folder: Path, size: Size) -> Path:
    """The folder of the base model, trained when it is not there."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / _DONE).is_file():
        return folder
    text, _ = sources(size.characters)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=size.vocabulary, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3407)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=3 * size.width,
            num_hidden_layers=size.layers, num_attention_heads=size.width // 32, num_key_value_heads=size.width // 64,
            max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=size.base_steps)
    batches = Batches(tokenizer(text)["input_ids"], size.batch, size.sequence)
    for step in range(size.base_steps):
        ids = batches[step].to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(folder)
    (folder / _DONE).touch()
    return folder


class Batches:
    """Batches `[batch, sequence]` of tokens at places drawn from a seed: the same for everyone."""

    def __init__(self, tokens: list[int], batch: int, sequence: int) -> None:
        import torch

        self.tokens, self.batch, self.sequence = torch.tensor(tokens), batch, sequence
        self.places = torch.Generator().manual_seed(1)
        self.made: list[Any] = []

    def __getitem__(self, index: int) -> Any:
        import torch

        while len(self.made) <= index:
            starts = torch.randint(len(self.tokens) - self.sequence, (self.batch,), generator=self.places)
            self.made.append(torch.stack([self.tokens[start : start + self.sequence] for start in starts.tolist()]))
        return self.made[index]


def set_adapters(model: Any) -> None:
    """Start the adapters from the same values in every library: A from a seed in the order of the names, B at zero."""
    import torch

    generator = torch.Generator().manual_seed(3407)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(values if "lora_A" in name else torch.zeros_like(values))


def curve(peer: str, way: str, base: Path, size: Size) -> dict[str, Any]:
    """The losses of `size.steps` steps of a peer in a dtype: mixed precision with fp32 adapters, scaled in fp16; `fp8`
    is bf16 with the frozen weights multiplied in FP8."""
    import importlib

    if peer in ("unsloth", "fastllm"):
        importlib.import_module(peer)
    import torch
    from transformers import AutoTokenizer

    from .peers import Setting, load

    dtype, setting = ("bfloat16", "fp8") if way == "fp8" else (way, "none")
    model, _ = load(peer, Setting(str(base), 4, 16, setting, size.sequence, dtype=dtype))
    set_adapters(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    device = parameters[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    _, text = sources(size.characters)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = Batches(tokenizer(text)["input_ids"], size.batch, size.sequence)
    losses = []
    started = time.perf_counter()
    for step in range(size.steps):
        ids = batches[step].to(device)
        with torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 6))
    return {
        "model": f"Llama, {size.layers} layers of {size.width}", "batch": size.batch, "sequence": size.sequence,
        "steps": size.steps, "seconds": round(time.perf_counter() - started, 1),
        "adapter_dtype": str(parameters[0].dtype).removeprefix("torch."), "losses": losses,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--way", required=True, choices=CURVES)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--models", type=Path, required=True, help="folder for the base model")
    options = parser.parse_args()
    size = SIZES[options.size]
    base = make_base(options.models / f"curves-{options.size}", size)
    print("RESULT " + json.dumps(curve(options.peer, options.way, base, size)), flush=True)


if __name__ == "__main__":
    main()
