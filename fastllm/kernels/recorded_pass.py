"""A layer's forward and backward as recorded launches, sent to the GPU in one call each: CUDA graphs.

Python takes hundreds of microseconds to launch the kernels of a layer; where the layer sees few tokens, the GPU waits
for it. A recording repeats the same kernels on the same addresses without it. So inputs are copied to where the
recording reads them, its outputs are overwritten by the next replay, and it holds for one shape and one set of tensors.
A replay gives what the recorded code gives: the kernels are the same.

A recording is busy from its forward until its backward is done or its graph is dropped; whoever wants another forward
in between has to run one that is not recorded.

Source: NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs"; torch.cuda.CUDAGraph for the memory of recordings.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch._utils import _unflatten_dense_tensors

from .dispatch import no_autocast
from .recorded_inputs import FixedRoom, SharedInputs, first_rows, tensors_of, with_tensors

Outputs = list[torch.Tensor]
# Runs a function once and returns its outputs, and what runs it again into the same outputs.
Recorder = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]


class NotRecordable(Exception):
    """Something of a pass can't be repeated without Python; the message says what."""


class Pass(Protocol):
    """What is recorded: a layer outside autograd, computing in one dtype."""

    def forward(self, x: torch.Tensor, call: Any) -> tuple[torch.Tensor, Any, str]:
        """(y, what the backward reads or None, the attention kernel that was chosen)"""
        ...

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, call: Any, kept: Any, backend: str, needs: Sequence[bool]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of x and of the parameters, where `needs` (x first) asks for them; consumes `kept`."""
        ...


class RecordedPass:
    """One layer's recording at one shape. `x` and `call` are those of the forward during which it is made.

    `x` is [..., rows, D], contiguous or handed on; those of `parameters`, in the order of the pass, that require
    gradients get them. The backward is recorded when it first runs.
    """

    def __init__(
        self,
        layer_pass: Pass,
        x: torch.Tensor,
        call: Any,
        parameters: Sequence[torch.Tensor | None],
        shared: SharedInputs,
        record: Recorder,
    ) -> None:
        self._pass, self._shared, self._record = layer_pass, shared, record
        self._needs = (x.requires_grad, *(p is not None and p.requires_grad for p in parameters))
        self.trained = [p for p in parameters if p is not None and p.requires_grad]
        self._x = shared.fixed(x)
        self._inputs = shared.copies_of(call, x.shape[-2])
        self._call = self._with_fixed_inputs(call)
        self._dy: torch.Tensor | None = None
        self._kept: Any = None
        self._backend = ""
        self._grads: _FlatTensors | None = None
        self._replay_backward: Callable[[], None] | None = None
        self._busy: Callable[[], Any] = lambda: None
        self.failure: str | None = None  # why the backward could not be recorded
        (self._y,), self._replay_forward = record(self._run_forward)
        shared.hand_on(self._y)
        # A replay reads them where they are, also when the layer lets go of them between a forward and its backward.
        self._weights = call.kept_weights.held() if getattr(call, "kept_weights", None) is not None else []

    @property
    def is_busy(self) -> bool:
        """Whether a forward still waits for its backward."""
        return self._busy() is not None

    @property
    def has_backward(self) -> bool:
        return self._replay_backward is not None

    def __call__(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        """The layer under autograd; of the same shape and layer as what was recorded."""
        return replay([self], x, self.start(x, call))

    @torch.no_grad()
    def start(self, x: torch.Tensor, call: Any) -> Ticket:
        """Launch the forward, whose node in autograd's graph `replay` makes: the GPU is busy while the host does."""
        self._load(x, call)
        ticket = Ticket()
        self.forward(ticket)
        return ticket

    def follows(self, other: RecordedPass) -> bool:
        """Whether it reads the output of `other` where that is, and beside it what that reads."""
        return (
            self._x.data_ptr() == other._y.data_ptr()
            and len(self._inputs) == len(other._inputs)
            and all(map(operator.is_, self._inputs, other._inputs))
        )

    def has_read(self, call: Any) -> bool:
        """Whether the latest replay read what `call` brings along."""
        return all(shared.is_of(source) for shared, source in zip(self._inputs, tensors_of(call), strict=True))

    def _load(self, x: torch.Tensor, call: Any) -> None:
        """Put x and what the call brings along where the recording reads them."""
        rows = x.shape[-2]
        if x.data_ptr() != self._x.data_ptr():
            first_rows(self._x, rows).copy_(x)
        for shared, source in zip(self._inputs, tensors_of(call), strict=True):
            shared.update(source, rows)

    def forward(self, ticket: Ticket) -> None:
        """Compute `y` of what was loaded or handed on. The recording is busy as long as `ticket` is held."""
        self._busy = weakref.ref(ticket)
        self._replay_forward()

    @property
    def y(self) -> torch.Tensor:
        """What the latest forward gave, for all recorded rows, overwritten by the next one."""
        return self._y

    def backward(self, dy: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of x, overwritten by a later backward of any of these layers, and of the trained parameters, which
        are not."""
        rows = dy.shape[-2]
        if self._replay_backward is None or self._dy is None:
            self._dy = self._shared.fixed(dy)
            try:
                self._dx, self._replay_backward = self._record(self._run_backward)
            except RuntimeError as failure:
                return self._without_recording(dy, failure)
        elif dy.data_ptr() != self._dy.data_ptr():
            first_rows(self._dy, rows).copy_(dy)
            if rows < self._dy.shape[-2]:
                self._dy[..., rows:, :].zero_()
        self._replay_backward()
        assert self._grads is not None
        return first_rows(self._dx[0].detach(), rows) if self._dx else None, self._grads.copies()

    def _without_recording(
        self, dy: torch.Tensor, failure: RuntimeError
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """The backward of this once; the layer is not to be replayed again."""
        self.failure, self._grads = str(failure), None
        assert self._dy is not None
        dx, grads = self._pass.backward(self._dy, self._x, self._call, self._kept, self._backend, self._needs)
        return None if dx is None else first_rows(dx, dy.shape[-2]), [grad for grad in grads if grad is not None]

    def _with_fixed_inputs(self, call: Any) -> Any:
        return with_tensors(call, iter([copied.value for copied in self._inputs]))

    @torch.no_grad()
    def _run_forward(self) -> Outputs:
        # Documents remember what they worked out of their boundaries: these are others in each forward.
        self._call = self._with_fixed_inputs(self._call)
        with no_autocast(self._x.device.type):
            y, self._kept, self._backend = self._pass.forward(self._x, self._call)
        if self._backend == "autograd" and y.is_cuda:
            shape, dtype = list(self._x.shape), str(y.dtype).removeprefix("torch.")
            raise NotRecordable(f"attention over rows {shape} in {dtype} runs under autograd")
        if self._backend == "cudnn" and not self._call.attention.causal:
            # Some versions read memory that is not theirs: https://github.com/NVIDIA/TransformerEngine/pull/2344
            raise NotRecordable("cuDNN's attention that sees both ways is not safe in a CUDA graph")
        return [y]

    @torch.no_grad()
    def _run_backward(self) -> Outputs:
        assert self._dy is not None
        kept = copy.copy(self._kept)  # a backward consumes it, and the recording writes to its tensors again
        if kept is not None:
            kept.attention = copy.copy(kept.attention)
        call = self._call
        if getattr(call, "gradient_room", None) is not None:
            call = dataclasses.replace(call, gradient_room=FixedRoom(self._shared, self._dy))
        dx, grads = self._pass.backward(self._dy, self._x, call, kept, self._backend, self._needs)
        written = [grad for grad in grads if grad is not None]
        assert len(written) == len(self.trained)
        if self._grads is None:
            self._grads = _FlatTensors(written, self._shared)
        self._grads.write(written)
        if dx is None:
            return []
        if self._shared.gradient_at(dx) is None:
            dx = self._shared.gradient(dx.shape, dx.dtype, dx.device, beside=self._dy).copy_(dx)
        self._shared.hand_on(dx)
        return [dx]


class Ticket:
    """Held by whoever will run a backward."""

    __slots__ = ("__weakref__",)


def replay(passes: Sequence[RecordedPass], x: torch.Tensor, started: Ticket) -> torch.Tensor:
    """Layers one after the other under autograd, as one node. The first was started with `x` and gave that ticket; each
    of the others `follows` the one before it."""
    return _Replayed.apply(x, passes, started, *(parameter for one in passes for parameter in one.trained))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, passes, started, *parameters):
        ctx.passes, ctx.ticket = passes, started
        ctx.save_for_backward(*parameters)
        for one in passes[1:]:
            one.forward(started)
        return first_rows(passes[-1].y.detach(), x.shape[-2])

    @staticmethod
    def backward(ctx, dy):
        _ = ctx.saved_tensors  # torch checks that no parameter was changed since the forward
        passes, ctx.passes = ctx.passes, None
        if passes is None:
            raise RuntimeError(
                "the activations of this layer were freed by an earlier backward; fastllm's fused layers do not "
                "support retain_graph or double backward: load the model with patch=False for those"
            )
        grads: list[list[torch.Tensor]] = []
        for one in reversed(passes):
            dy, found = one.backward(dy)
            grads.append(found)
        ctx.ticket = None
        return dy, None, None, *(grad for found in reversed(grads) for grad in found)


class _FlatTensors:
    """Tensors laid end to end, one buffer for each dtype, so that all are copied by few launches."""

    def __init__(self, like: Sequence[torch.Tensor], shared: SharedInputs) -> None:
        self._length = len(like)
        self._places: dict[torch.dtype, list[int]] = {}
        for place, tensor in enumerate(like):
            self._places.setdefault(tensor.dtype, []).append(place)
        self._flat, self._views = {}, {}
        for dtype, places in self._places.items():
            tensors = [like[place] for place in places]
            flat = shared.scratch(sum(t.numel() for t in tensors), dtype, tensors[0].device)
            parts = flat.split([t.numel() for t in tensors])
            self._flat[dtype] = flat
            self._views[dtype] = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def write(self, tensors: Sequence[torch.Tensor]) -> None:
        for dtype, places in self._places.items():
            # All of a GPU takes part, where `torch._foreach_copy_` starts one program for 65,536 values.
            torch.cat([tensors[place].reshape(-1) for place in places], out=self._flat[dtype])

    def copies(self) -> list[torch.Tensor]:
        """What was written, as new tensors."""
        if len(self._flat) == 1:
            ((dtype, flat),) = self._flat.items()
            return list(_unflatten_dense_tensors(flat.clone(), self._views[dtype]))
        found: dict[int, torch.Tensor] = {}
        for dtype, places in self._places.items():
            copied = _unflatten_dense_tensors(self._flat[dtype].clone(), self._views[dtype])
            found |= zip(places, copied, strict=True)
        return [found[place] for place in range(self._length)]


class CudaRecorder:
    """Records on one device. Recordings of one recorder share the memory of what lives inside a pass only. So forwards
    are recorded, and run, in the order of the layers, and all of them before the first backward."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What the same layers used without a recording lies idle from now on, and a recording can't reuse it.
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Other threads go on with what a recording forbids its own: loading data, pinning memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return outputs, graph.replay
