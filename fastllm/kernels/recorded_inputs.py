"""What recorded passes read: copies at fixed addresses, and batches of fewer rows than were recorded.

Shapes: x [..., rows, D]; boundaries of documents as in `documents.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .attention import AttentionCase
from .dispatch import next_power_of_2
from .documents import Documents
from .gradient_room import GradientRoom
from .projections import ProjectionGroup

# Documents of at most this many rows are recorded as if they could have as many: windows of a vision tower.
_SHORT_DOCUMENTS = 64


class SharedInputs:
    """What the recordings of one model and shape share: fixed copies of tensors that all layers of a forward read
    alike (rotary angles, masks, boundaries of documents), and the outputs that one layer hands to the next.

    With `rows` the passes are recorded for that many rows, the last dimension but one of x, and serve batches of fewer:
    what is left over is a segment of its own, with no gradient.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self._copies: list[SharedTensor] = []
        self._handed: dict[int, torch.Tensor] = {}
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._gradients: list[torch.Tensor] = []

    def copies_of(self, call: Any, given_rows: int) -> list[SharedTensor]:
        """Copies of the call's tensors, in the order of `tensors_of`."""
        case: AttentionCase = call.attention
        boundaries = None if case.documents is None else case.documents.cu_seqlens
        made = []
        for source in tensors_of(call):
            known = next((copied for copied in self._copies if copied.is_of(source)), None)
            if known is None:
                if source is boundaries and case.documents is not None and self.rows is not None:
                    known = SharedBoundaries(case.documents)
                else:
                    known = SharedTensor(source.new_zeros(self.shape(source)))
                known.update(source, given_rows)
                self._copies.append(known)
            made.append(known)
        return made

    def shape(self, x: torch.Tensor) -> torch.Size:
        """The shape that a recording has for x [..., rows, D]."""
        return x.shape if self.rows is None else torch.Size((*x.shape[:-2], self.rows, x.shape[-1]))

    def hand_on(self, output: torch.Tensor) -> None:
        """Let the next layer read `output` where it is."""
        self._handed[output.data_ptr()] = output

    def scratch(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory [numel] that every recording may write to, read right after its replay."""
        known = self._scratch.get(dtype)
        if known is None or known.numel() < numel:
            known = self._scratch[dtype] = torch.empty(numel, dtype=dtype, device=device)
        return known[:numel]

    def gradient(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, beside: torch.Tensor
    ) -> torch.Tensor:
        """Memory for a gradient that the layer before reads, and nobody after it: other than that of `beside`, the
        gradient which it is made of. So two serve all layers, one after the other."""
        for known in self._gradients:
            is_alike = (known.shape, known.dtype) == (torch.Size(shape), dtype)
            if is_alike and known.data_ptr() != beside.data_ptr():
                return known
        made = torch.empty(shape, dtype=dtype, device=device)
        self._gradients.append(made)
        return made

    def gradient_at(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """The memory of `gradient` that has its address, if it does."""
        return next((known for known in self._gradients if known.data_ptr() == gradient.data_ptr()), None)

    def fixed(self, x: torch.Tensor) -> torch.Tensor:
        """Where a recording shall read what is in `x` now: where it is handed on, else a copy."""
        known, shape = self._handed.get(x.data_ptr()), self.shape(x)
        if known is not None and known.shape == shape and known.dtype == x.dtype and x.stride() == known.stride():
            return known.detach()
        copied = x.new_zeros(shape)
        first_rows(copied, x.shape[-2]).copy_(x.detach())
        return copied


class FixedRoom(GradientRoom):
    """Room for the gradients that recorded layers hand on: at fixed addresses, where the next one reads them."""

    def __init__(self, shared: SharedInputs, beside: torch.Tensor) -> None:
        super().__init__()
        self._shared, self._beside = shared, beside

    def buffer(self, group: ProjectionGroup, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._shared.gradient((like.shape[0], group.output_buffer_width), dtype, like.device, self._beside)

    def leave(self, buffer: torch.Tensor) -> None:
        pass

    def take(self, gradient: torch.Tensor, width: int) -> torch.Tensor | None:
        known = self._shared.gradient_at(gradient)
        if known is None or known.shape != (gradient.shape[0], width) or known.stride() != gradient.stride():
            return None
        return known


class SharedTensor:
    """A copy, at a fixed address, of a tensor that changes from forward to forward."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value
        self._source: torch.Tensor | None = None
        self._version = 0

    def is_of(self, source: torch.Tensor) -> bool:
        """Whether the copy was made of the same memory in the same state. The source is held, so that no other tensor
        takes its address."""
        return (
            self._source is not None
            and source.data_ptr() == self._source.data_ptr()
            and source._version == self._version
            and source.shape == self._source.shape
            and source.stride() == self._source.stride()
        )

    def update(self, source: torch.Tensor, given_rows: int) -> None:
        """Copy `source`, of a batch of so many rows, unless that was done."""
        if not self.is_of(source):
            self._write(source, given_rows)
            self._source, self._version = source.detach(), source._version

    def _write(self, source: torch.Tensor, given_rows: int) -> None:
        target = self.value if source.shape == self.value.shape else first_rows(self.value, source.shape[-2])
        target.copy_(source)


class SharedBoundaries(SharedTensor):
    """The offsets of documents of fewer rows than are recorded, as many as such a recording has: the rows left over
    are cut into documents that are no longer than the longest, and what is left of the offsets into empty ones."""

    def __init__(self, rounded: Documents) -> None:
        count = _most_documents(rounded) + 1
        super().__init__(torch.zeros(count, dtype=torch.int32, device=rounded.cu_seqlens.device))
        self._longest, self._rows = rounded.max_seqlen, rounded.length

    def _write(self, source: torch.Tensor, given_rows: int) -> None:
        count = source.numel()
        self.value[:count].copy_(source)
        steps = torch.arange(1, self.value.numel() - count + 1, dtype=torch.int32, device=source.device)
        self.value[count:].copy_((steps * self._longest + given_rows).clamp_(max=self._rows))


def call_signature(call: Any, shared: SharedInputs) -> tuple:
    """What two calls have in common that one recording serves: everything but the contents of their tensors."""
    case: AttentionCase = call.attention
    documents = case.documents
    boundaries = None if documents is None else documents.cu_seqlens
    return (
        [(None if t is boundaries and shared.rows else shared.shape(t), t.dtype) for t in tensors_of(call)],
        None if documents is None else (documents.max_seqlen, documents.batch, documents.length),
        case.mask is None, call.cos is None,
        case.scaling, case.sliding_window, case.softcap, case.causal,
    )  # fmt: skip


def rounded(call: Any, rows: int) -> Any | None:
    """The call, of documents in a single row, for a recording of that many rows; None where it has too many."""
    case: AttentionCase = call.attention
    assert case.documents is not None and case.documents.batch == 1
    longest = case.documents.max_seqlen
    if longest <= _SHORT_DOCUMENTS:
        longest = _SHORT_DOCUMENTS
    else:
        longest = rows if 2 * longest > rows else next_power_of_2(longest)
    documents = Documents(case.documents.cu_seqlens, longest, 1, rows)
    count, spare = documents.cu_seqlens.numel() - 1, -(-(rows - case.documents.length) // longest)
    if count + spare > _most_documents(documents):
        return None
    return replace(call, attention=replace(case, documents=documents))


def _most_documents(documents: Documents) -> int:
    """How many documents a recording of so many rows has room for: windows of a vision tower, or images."""
    return documents.length // 16 + 8 if documents.max_seqlen <= _SHORT_DOCUMENTS else 24


def first_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` of x [..., more rows, D], a view."""
    return x if rows == x.shape[-2] else x[..., :rows, :]


def is_recordable(call: Any) -> bool:
    """Whether attention runs in kernels alone, and draws no random numbers."""
    return call.attention.function is None and not call.attention.dropout


def tensors_of(call: Any) -> list[torch.Tensor]:
    """What a call brings along beside x: rotary angles, a mask, boundaries of documents."""
    case: AttentionCase = call.attention
    boundaries = None if case.documents is None else case.documents.cu_seqlens
    return [tensor for tensor in (call.cos, call.sin, case.mask, boundaries) if tensor is not None]


def with_tensors(call: Any, tensors: Any) -> Any:
    """The call with other tensors, in the order of `tensors_of`."""
    cos, sin = (None if angles is None else next(tensors) for angles in (call.cos, call.sin))
    case: AttentionCase = call.attention
    mask = None if case.mask is None else next(tensors)
    documents = case.documents
    if documents is not None:
        documents = Documents(next(tensors), documents.max_seqlen, documents.batch, documents.length)
    return replace(call, cos=cos, sin=sin, attention=replace(case, mask=mask, documents=documents))
