"""Importance matrices: how strongly the inputs of each column of a weight, or the outputs of each row, matter.

For the columns it is E[x_j^2] over calibration tokens, what llama.cpp calls an imatrix; for the rows E[g_i^2], the mean
squared gradient of the loss. Both are second moments, gathered while a model runs, one batch at a time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from .container import GGUFError, Metadata, lay_out
from .reader import GGUFReader
from .tensor_types import F32
from .writer import gguf_writer

_SUMS, _COUNTS = ".in_sum2", ".counts"


class SecondMoments:
    """Running sums of squares per column, by tensor name.

        moments = SecondMoments()
        moments.add(("blk.0.attn_q.weight", "blk.0.attn_k.weight"), hidden_states)   # tensors that share an input
        moments.add("blk.0.ffn_up_exps.weight", routed_rows, experts=expert_ids, num_experts=8)
        importance = moments.means()

    Sums are fp64 on the device of the rows (fp32 on Apple GPUs, which have no fp64).
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}
        self._counts: dict[tuple[str, ...], torch.Tensor] = {}

    def add(
        self,
        names: str | Sequence[str],
        rows: torch.Tensor,
        *,
        experts: torch.Tensor | None = None,
        num_experts: int = 1,
    ) -> None:
        """Add rows [..., C] of one batch. With `experts` [T], row t of [T, C] belongs to that expert of the tensor.

        Raises `GGUFError` for rows that are not finite or of another width than before.
        """
        key = (names,) if isinstance(names, str) else tuple(names)
        rows = rows.detach().reshape(-1, rows.shape[-1])
        wide = torch.float32 if rows.device.type == "mps" else torch.float64
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = torch.zeros(num_experts, rows.shape[1], dtype=wide, device=rows.device)
            self._counts[key] = torch.zeros(num_experts, dtype=wide, device=rows.device)
        if sums.shape != (num_experts, rows.shape[1]):
            raise GGUFError(f"{num_experts} x {rows.shape[1]} columns after {tuple(sums.shape)}", where=key[0])
        squares = rows.float().square()
        if experts is None:
            total = squares.sum(0, dtype=wide)
            if not bool(torch.isfinite(total).all()):
                raise GGUFError("a calibration batch has values that are not finite", where=key[0])
            sums += total
            self._counts[key] += rows.shape[0]
        else:
            sums.index_add_(0, experts.to(sums.device), squares.to(wide))
            self._counts[key].index_add_(0, experts.to(sums.device), torch.ones_like(experts, dtype=wide))

    def means(self, min_tokens: int = 32) -> dict[str, torch.Tensor]:
        """Mean squares by name, fp32 on the CPU: [C], or [experts, C] for a tensor with experts.

        An expert that fewer than `min_tokens` tokens met takes the mean of its layer.
        """
        means = {}
        for key, sums in self._sums.items():
            counts = self._counts[key][:, None]
            mean = sums / counts.clamp_min(1)
            overall = sums.sum(0, keepdim=True) / counts.sum().clamp_min(1)
            means[key] = mean if len(mean) == 1 else torch.where(counts >= min_tokens, mean, overall)
        return _by_name(means)

    def shares(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """As `means`, but over `num_tokens` tokens, those that an expert did not meet counted as zero."""
        return _by_name({key: sums / num_tokens for key, sums in self._sums.items()})

    def save(self, path: str | os.PathLike[str], *, chunk_size: int = 512, dataset: str = "calibration") -> None:
        """Write the sums as llama.cpp's imatrix file, which `llama-quantize --imatrix` reads too."""
        tensors: dict[str, torch.Tensor] = {}
        for key, sums in self._sums.items():
            for name in key:
                tensors[f"{name}{_SUMS}"] = sums.float().cpu()
                tensors[f"{name}{_COUNTS}"] = self._counts[key].float().cpu()[:, None]
        most = max((float(counts.max()) for counts in self._counts.values()), default=0)
        metadata: Metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": [dataset],
            "imatrix.chunk_count": int(most) // chunk_size,
            "imatrix.chunk_size": chunk_size,
        }
        table = lay_out((name, tuple(tensor.shape), F32) for name, tensor in tensors.items())
        with gguf_writer(path, metadata, table) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor.contiguous().view(torch.uint8))


def _by_name(values: Mapping[tuple[str, ...], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values [experts, C] of tensors that share them, each under its own name, [C] where there is one expert."""
    named: dict[str, torch.Tensor] = {}
    for key, value in values.items():
        value = value.float().cpu()
        named |= dict.fromkeys(key, value[0] if len(value) == 1 else value)
    return named


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Mean squares by tensor name of an imatrix file in GGUF, [C] or [experts, C], for `export_gguf(importance=...)`.

    Raises `GGUFError` for a file that is not one.
    """
    with GGUFReader(path) as reader:
        if reader.metadata.get("general.type") != "imatrix":
            raise GGUFError("not an imatrix file", where=os.fspath(path))
        values = {name: reader.data(name).clone().view(torch.float32) for name in reader.tensors}
    means = {}
    for name, sums in values.items():
        if not name.endswith(_SUMS):
            continue
        base = name.removesuffix(_SUMS)
        counts = values.get(f"{base}{_COUNTS}")
        if counts is None or counts.shape != (sums.shape[0], 1):
            raise GGUFError(f"no counts that fit {name}", where=os.fspath(path))
        overall = sums.sum(0, keepdim=True) / counts.sum().clamp_min(1)
        mean = torch.where(counts > 0, sums / counts.clamp_min(1), overall)
        means[base] = mean[0] if len(mean) == 1 else mean
    return means
