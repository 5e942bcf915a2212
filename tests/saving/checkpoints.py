"""Checkpoints, trained adapters, and the truth that saved models are compared with."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastllm import FastLanguageModel

from ..gguf.models import VOCAB_SIZE, save_byte_level_tokenizer, tiny_model
from ..models.families import FAMILIES, build

SHARDED = "sharded llama"
EXPERTS = ("mixtral", "qwen3moe")


def make_base(folder: Path, family: str, *, dtype=torch.bfloat16, **settings) -> Path:
    """A bf16 checkpoint of the family in `folder`; of `SHARDED`, in several files with an index."""
    if family in EXPERTS:
        tiny_model(family, num_hidden_layers=2).to(dtype).save_pretrained(folder)
        return save_byte_level_tokenizer(folder)
    config = copy.deepcopy(FAMILIES["llama" if family == SHARDED else family])
    config.vocab_size, config.eos_token_id, config.bos_token_id, config.pad_token_id = VOCAB_SIZE, 4, 0, 2
    for name, value in settings.items():
        setattr(config, name, value)
    size = "300KB" if family == SHARDED else "5GB"
    build(config, dtype=dtype).save_pretrained(folder, max_shard_size=size)
    save_byte_level_tokenizer(folder)
    return folder


def load(folder, bits: int = 16, **options):
    """(model, tokenizer) by fastllm, the base held in 4, 8 or 16 bits, computing in fp32 on any machine."""
    options = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, "dtype": torch.float32, **options}
    return FastLanguageModel.from_pretrained(str(folder), **options)


def adapted(folder, bits: int = 16, *, dtype=torch.float32, **options):
    """(model with a LoRA whose every part is away from its start, tokenizer)."""
    model, tokenizer = load(folder, bits, dtype=dtype)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, **options)
    disturb(model)
    return model, tokenizer


def disturb(model, *, seed: int = 1, scale: float = 0.05) -> None:
    """Move every trainable tensor, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder, by the reference library."""
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        found |= load_file(path)
    return found


def merged_by_peft(model, base, scratch: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT makes of the same adapters on the base checkpoint, in float64."""
    model.save_pretrained(scratch)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    folders = {name: scratch if name == "default" else scratch / name for name in model.peft_config}
    first, *others = folders
    twin = PeftModel.from_pretrained(plain, folders[first], adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        twin.load_adapter(folders[name], name, autocast_adapter_dtype=False)
    twin = twin.double()
    twin.base_model.set_adapter(model.active_adapters)
    return twin.merge_and_unload().state_dict()


def on_16_bit_base(model, base, scratch: Path):
    """The adapter as PEFT runs it on the base checkpoint in fp32."""
    model.save_pretrained(scratch)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), scratch)


def assert_rounded_once(saved: torch.Tensor, truth: torch.Tensor) -> None:
    """`saved` is the float64 `truth` in its own dtype: equal but for the few values whose fp32 sum is at a tie."""
    rounded = truth.to(saved.dtype)
    assert saved.shape == rounded.shape
    if saved.dtype.itemsize == 2:
        assert float((saved != rounded).float().mean()) < 2e-3
    torch.testing.assert_close(saved, rounded, rtol=torch.finfo(saved.dtype).eps, atol=1e-6)


def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] in float64."""
    model.eval()
    with torch.no_grad():
        return F.log_softmax(model(input_ids=ids.to(model.device), use_cache=False).logits[0].double().cpu(), -1)


def divergence(model, other) -> float:
    """Mean KL(model || other) in nats a token."""
    ids = torch.randint(5, VOCAB_SIZE - 10, (1, 48), generator=torch.Generator().manual_seed(5))
    p, q = log_probs(model, ids), log_probs(other, ids)
    width = min(p.shape[-1], q.shape[-1])
    p, q = p[:, :width], q[:, :width]
    return float((p.exp() * (p - q)).sum(-1).mean())


def plain(folder, **options):
    """(model, tokenizer) by transformers alone."""
    options = {"dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)
