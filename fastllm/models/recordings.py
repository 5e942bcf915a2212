"""Which layers of a model run as recordings (CUDA graphs): those of small batches whose shape comes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._compat import collects_outputs
from .._device import free_bytes, product_rate
from .._notices import notice
from ..kernels.recorded_inputs import SharedInputs, call_signature, is_recordable, rounded
from ..kernels.recorded_pass import CudaRecorder, NotRecordable, RecordedPass, Recorder
from .chains import Chain, Known, Recordable

# Rows of a layer's input from which on the GPU is busy for longer than the host takes to launch its kernels.
MOST_ROWS = 4096
# A shape is recorded when it comes for the third time: recording takes about as long as two forwards, and what is
# compiled at a first call must not be compiled in a recording.
_FORWARDS_BEFORE = 2
# Replays that make up for a recording.
_WORTH_RECORDING = 8
_MOST_SHAPES = 16
# Rows of documents in a single row are rounded up to a multiple of this.
_ROWS_MULTIPLE = 128
# What the host takes to launch the kernels of a layer, forward and backward, one by one.
_LAUNCH_SECONDS = 2e-3


def most_rows(layer: Any) -> int:
    """Rows of input up to which a layer is recorded. FP8 products take half as long, their launches do not."""
    return 2 * MOST_ROWS if all(group.is_fp8 for group in layer.groups()) else MOST_ROWS


class Recordings:
    """The recordings of one model, by part (`decoder`, `tower`) and shape.

    A part's forward begins with `begin`; then `find` answers for each of its layers, in their order.
    """

    def __init__(self, record: Callable[[torch.device], Recorder] | None = None) -> None:
        self.is_on = True
        self.last_batch = (0, 0)  # rows and length, before they are rounded up
        self.beside = 0  # bytes that the largest batch so far takes without recordings
        self._record = record
        self._shapes: dict[tuple, _Shape] = {}
        self._current: dict[str, _Shape | None] = {}
        self._weights: dict[str, int] = {}  # entries of a layer's matrices

    def __reduce__(self) -> tuple:
        return Recordings, (), {"is_on": self.is_on}  # a copied or stored model makes its own

    @property
    def count(self) -> int:
        """How many shapes are recorded."""
        return sum(bool(shape.passes) for shape in self._shapes.values())

    def waits_for_host(self, part: str, rows: int, device: torch.device) -> bool:
        """Whether the GPU computes so many rows of a layer in less time than the host takes to launch it, so that more
        rows cost nothing. False before the first forward of the part."""
        weights = self._weights.get(part)
        return self.is_on and weights is not None and 4 * rows * weights < _LAUNCH_SECONDS * product_rate(device)

    def begin(
        self,
        part: str,
        x: torch.Tensor,
        layer: Any,
        nbytes: Callable[[], int],
        *,
        round_rows: bool = False,
        is_wanted: bool = True,
    ) -> None:
        """Start a forward of a part with its first layer and the input `x` of that. `nbytes` says what all layers hold.

        With `round_rows` one recording serves batches of up to a multiple of so many rows, where they cost nothing:
        those whose calls have documents in a single row. Where recordings are not `is_wanted` the part runs without.
        """
        can_record = self._record is not None or (x.is_cuda and torch.version.hip is None)
        if not can_record:
            return
        self._weights[part] = sum(group.out_features * group.in_features for group in layer.groups())
        self._current[part] = None
        if not (is_wanted and self.is_on and torch.is_grad_enabled() and x.numel() <= most_rows(layer) * x.shape[-1]):
            return
        rows = -(-x.shape[-2] // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
        if not (round_rows and self.waits_for_host(part, rows, x.device)):
            rows, round_rows = x.shape[-2], False
        key = (
            part,
            x.shape[:-2],
            rows,
            x.shape[-1],
            x.stride(),
            x.dtype,
            x.device,
            torch.are_deterministic_algorithms_enabled(),
        )
        shape = self._shapes.setdefault(key, _Shape(x.device, rows if round_rows else None))
        shape.forwards += 1
        if shape.forwards <= shape.forwards_before or shape.is_left_alone or shape.is_busy or collects_outputs():
            return
        failure = next((known.recorded.failure for known in shape.passes.values() if known.recorded.failure), None)
        if failure is not None:
            self._give_up(shape, part, failure)
            return
        if not shape.passes and not self._has_room(nbytes(), x.device):
            shape.is_left_alone = True
            return
        shape.replays += bool(shape.passes)
        self._current[part], shape.last_index, shape.chain = shape, -1, None

    def find(
        self,
        part: str,
        index: int,
        x: torch.Tensor,
        call: Any,
        layer: Any,
        how: Recordable,
        *,
        conditions: tuple,
    ) -> Callable[[], torch.Tensor] | None:
        """What runs layer `index` as a recording, made now if there is none; None where the layer has to run without.

        `conditions` are further values that a recording holds for, compared by identity and then by value.
        """
        shape = self._current.get(part)
        if shape is None:
            return None
        chain = shape.chain if shape.chain is not None and index in shape.chain else None
        starts_over, shape.last_index = index <= shape.last_index, index
        fixed = call if is_recordable(call) and not starts_over and x.device == shape.device else None
        if fixed is not None and shape.rows is not None:
            fixed = shape.rounded(fixed)
        known = shape.passes.get(index)
        signature = None
        if fixed is not None:
            signature = (*conditions, x.requires_grad, shape.shared.shape(x), call_signature(fixed, shape.shared))
        if chain is not None and known is not None:
            if index == chain.last:
                shape.chain = None
            if signature == known.signature and known.recorded.has_read(fixed):
                return chain.passed(index, x, call)
            self._drop(shape, part)
            return chain.run_without(index, x, call, layer)
        if fixed is None:  # the rest of this forward runs without, too: it must not disturb what those before it keep
            self._current[part] = None
            return None
        if known is not None and (known.layer is not layer or known.signature != signature):
            # Something was exchanged or switched: the shape is recorded anew when it has come often enough again.
            self._drop(shape, part)
            return None
        if known is None:
            parameters = layer.parameters()
            if not (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
                return None
            if not shape.takes(index):
                self._drop(shape, part)
                return None
            if shape.record is None:
                shape.record = self._record(x.device) if self._record is not None else CudaRecorder(x.device)
            try:
                recorded = RecordedPass(how.make_pass(layer), x, fixed, parameters, shape.shared, shape.record)
            except (NotRecordable, RuntimeError) as failure:
                self._give_up(shape, part, str(failure))
                return None
            known = shape.passes[index] = Known(recorded, layer, signature, how)
            return lambda: recorded(x, fixed)
        started = known.recorded.start(x, fixed)  # the GPU is busy with it while the host looks for what follows
        chain = Chain(index, shape.links(index), x, call)
        shape.chain = chain if chain.last > index else None
        return lambda: chain.run(started)

    def layer_in_chain(self, part: str, index: int) -> Any | None:
        """The layer `index` if it ran with one before it, in this forward."""
        shape = self._current.get(part)
        if shape is None or shape.chain is None or index not in shape.chain:
            return None
        return shape.passes[index].layer

    def release(self) -> None:
        """Drop every recording; shapes that come often enough again are recorded anew."""
        for shape in self._shapes.values():
            shape.forget()
        self._current.clear()

    def _give_up(self, shape: _Shape, part: str, reason: str) -> None:
        line = reason.splitlines()[0]
        notice(f"fastllm: layers of some batches are launched kernel by kernel, since {line}", once=f"record:{line}")
        self._drop(shape, part)
        shape.is_left_alone = True

    def _drop(self, shape: _Shape, part: str) -> None:
        shape.forget()
        self._current[part] = None

    def _has_room(self, nbytes: int, device: torch.device) -> bool:
        """Whether a recording, which holds its memory from step to step, leaves enough for batches without one."""
        free = free_bytes(device)
        return self.count < _MOST_SHAPES and nbytes <= min(free // 2, free - self.beside)


class _Shape:
    """What is known of one shape of a part's input; with `rows`, of all shapes that are rounded up to so many."""

    def __init__(self, device: torch.device, rows: int | None) -> None:
        self.device, self.rows = device, rows
        self.forwards, self.last_index = 0, -1
        self.forwards_before = _FORWARDS_BEFORE
        self.is_left_alone = False
        self.clear()

    @property
    def is_busy(self) -> bool:
        """Whether an earlier forward still waits for its backward."""
        return any(known.recorded.is_busy for known in self.passes.values())

    def takes(self, index: int) -> bool:
        """Whether layer `index` can still be recorded: what it keeps must not lie where a later pass writes."""
        return all(index > known and not other.recorded.has_backward for known, other in self.passes.items())

    def rounded(self, call: Any) -> Any | None:
        """The call for as many rows as are recorded, made once for layers that share it; None where it has too many."""
        assert self.rows is not None
        if self._rounded is None or self._rounded[0] is not call:
            self._rounded = call, rounded(call, self.rows)
        return self._rounded[1]

    def links(self, first: int) -> list[Known]:
        """Layer `first`, and those after it that can run with it."""
        links = [self.passes[first]]
        while (known := self.passes.get(first + len(links))) is not None and known.runs_after(links[-1]):
            links.append(known)
        return links

    def forget(self) -> None:
        """Begin anew; where a recording was hardly used, after twice as many forwards: others may go the same way."""
        if self.passes and self.replays < _WORTH_RECORDING:
            self.forwards_before *= 2
        self.forwards = 0
        self.clear()

    def clear(self) -> None:
        self.passes: dict[int, Known] = {}
        self.shared = SharedInputs(self.rows)
        self.chain: Chain | None = None
        self._rounded: tuple[Any, Any | None] | None = None
        self.record: Recorder | None = None
        self.replays = 0
