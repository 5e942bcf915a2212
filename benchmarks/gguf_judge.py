"""How far a GGUF file's model is from the 16-bit one: both run by transformers in fp32 on the same text.

The file is decoded back into a copy of the model. Where `xllamacpp` is installed, llama.cpp itself can judge instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastllm.gguf import GGUFReader
from fastllm.gguf.architectures import architecture_of
from fastllm.gguf.quantizers import quantizer_of

_LARGEST_ERROR = 0.5  # relative; a weight that is further off was put in a wrong place


def quantized_weights(
    path: Path, config: Mapping[str, Any], device: torch.device
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(checkpoint name, row numbers [R], decoded rows [R, C] in fp32) of each quantized tensor of a GGUF file."""
    architecture, model = architecture_of(config)
    layout = architecture.layout(model)
    with GGUFReader(path) as reader:
        for name, targets in layout.targets.items():
            for target in targets:
                info = reader.tensors.get(target.name)
                if info is None or not info.type.is_quantized:
                    continue
                if target.expert is not None:
                    raise NotImplementedError(f"{target.name} holds experts")
                weight = quantizer_of(info.type).decode(reader.data(target.name).to(device))
                # What the export does to the rows, done to their numbers.
                rows = target.change(torch.arange(info.shape[0], device=device)[:, None])[:, 0]
                yield name, rows, weight


def decoded_model(model: torch.nn.Module, path: Path) -> torch.nn.Module:
    """A copy of `model`, in fp32, with the weights that the GGUF file holds of it."""
    twin = copy.deepcopy(model)
    device = next(model.parameters()).device
    found = 0
    for name, rows, weight in quantized_weights(path, model.config.to_dict(), device):
        held = twin.get_parameter(name).data
        error = float((held[rows] - weight).norm() / held[rows].norm())
        if not error < _LARGEST_ERROR:
            raise ValueError(f"{path.name}: {name} is {error:.0%} off")
        held.index_copy_(0, rows, weight)
        found += 1
    if not found:
        raise ValueError(f"{path.name}: no tensor is quantized")
    return twin


@torch.no_grad()
def compare(model: torch.nn.Module, other: torch.nn.Module, rows: torch.Tensor, batch: int) -> dict[str, float]:
    """KL(model || other) over all predictions in `rows` [R, T], in nats, with both perplexities."""
    divergences, losses, other_losses, same = [], [], [], []
    for ids in rows.to(next(model.parameters()).device).split(batch):
        p = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].double(), -1)
        q = F.log_softmax(other(input_ids=ids, use_cache=False).logits[:, :-1].double(), -1)
        divergences.append((p.exp() * (p - q)).sum(-1).flatten())
        losses.append(-p.gather(-1, ids[:, 1:, None]).flatten())
        other_losses.append(-q.gather(-1, ids[:, 1:, None]).flatten())
        same.append((p.argmax(-1) == q.argmax(-1)).flatten())
    divergence = torch.cat(divergences)
    return {
        "predictions": divergence.numel(),
        "kl_mean": float(divergence.mean()),
        # torch.quantile takes 16 million values at most.
        "kl_99": float(divergence.kthvalue(max(1, round(0.99 * divergence.numel()))).values),
        "perplexity_16_bit": float(torch.cat(losses).mean().exp()),
        "perplexity": float(torch.cat(other_losses).mean().exp()),
        "same_top_token": float(torch.cat(same).double().mean()),
    }


def compare_by_llama_cpp(model: torch.nn.Module, path: Path, rows: torch.Tensor) -> dict[str, float]:
    """KL(model || the file as llama.cpp runs it) of the one token after each of `rows`. Needs `xllamacpp`."""
    from tests.gguf import llama_cpp as judge

    device = next(model.parameters()).device
    with torch.no_grad(), judge.loaded(path, model.config.vocab_size) as loaded:
        p = torch.cat([model(input_ids=ids.to(device)).logits[:, -1].double().cpu() for ids in rows.split(16)])
        p = F.log_softmax(p, -1)
        q = torch.stack([torch.from_numpy(loaded.next_token_logprobs(ids.tolist())).double() for ids in rows])
    divergence = (p.exp() * (p - q)).sum(-1)
    return {
        "predictions": len(rows), "kl_mean": float(divergence.mean()), "kl_99": float(divergence.quantile(0.99)),
    }  # fmt: skip
