"""The 8-bit AdamW of bitsandbytes in few launches, on GPUs by a faster kernel.

bitsandbytes updates one tensor after the other: several Python calls, a launch and a wait for the GPU each. A model
with LoRA has hundreds of small ones, and the waits take ten times as long as the work. But its update treats each block
of 256 values by itself, so tensors that lie end to end, each from the start of a block, can be updated by one call
(Dettmers et al., "8-bit Optimizers via Block-wise Quantization", https://arxiv.org/abs/2110.02861). Its CUDA kernel
takes nine times as long as the bytes need; on GPUs `fastllm.kernels.adam_8bit` makes the update instead.

Parameters and states have the bits that bitsandbytes gives them: on CPUs always, where its own update runs; on NVIDIA
GPUs as far as the docstring of that kernel says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import MissingPackageError
from ..kernels.adam_8bit import BLOCK, adam_8bit, code_tables
from ..kernels.dispatch import use_triton

try:
    import bitsandbytes
    from bitsandbytes.functional import optimizer_update_8bit_blockwise
    from bitsandbytes.optim.optimizer import Optimizer2State
    from bitsandbytes.utils import sync_gpu
except ImportError as error:
    raise MissingPackageError(
        "8-bit optimizers need bitsandbytes", where="AdamW8bit", fix="pip install bitsandbytes"
    ) from error

# Values that one call updates at most. A tensor with more of them keeps a GPU busy by itself.
_CHUNK = 2**22
_CODES, _SCALES, _MAPS = ("state1", "state2"), ("absmax1", "absmax2"), ("qmap1", "qmap2")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Chunk:
    """Parameters of one dtype and device whose states lie end to end, each from the start of a block.

    `state1` and `state2` are uint8 `[size]`, `absmax1` and `absmax2` fp32 `[size / 256]`. What `states` holds moves
    there, and `states` holds views of it afterwards. The gradient of padding is zero: it never sets a block's scale.
    """

    def __init__(self, parameters: list[Tensor], states: Sequence[dict[str, Any]], tables: Tensor | None) -> None:
        device, self.dtype = parameters[0].device, parameters[0].dtype
        self.parameters, self.tables = parameters, tables
        self.offsets = list(accumulate(map(_padded, parameters), initial=0))
        size = self.offsets[-1]
        self.flat = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name in _CODES}
        self.flat |= {name: torch.zeros(size // BLOCK, device=device) for name in _SCALES}
        for name, flat in self.flat.items():
            held = [state[name] for state in states]
            views = self._views(flat, held, values_each=BLOCK if name in _SCALES else 1)
            torch._foreach_copy_(views, held)
            for state, view in zip(states, views, strict=True):
                state[name] = view
        self.maps = {name: states[0][name] for name in _MAPS}
        # The views outlive what they look at: there is memory under them during an update only.
        self.buffer = torch.empty(2, size, dtype=self.dtype, device=device)
        self.values, self.gradients = (self._views(row, parameters) for row in self.buffer)
        self.buffer.untyped_storage().resize_(0)

    def _views(self, flat: Tensor, shaped: Sequence[Tensor], values_each: int = 1) -> list[Tensor]:
        """The part of `flat` that belongs to each parameter, in the shapes of `shaped`."""
        starts = (offset // values_each for offset in self.offsets[:-1])
        return [flat[start : start + t.numel()].view(t.shape) for start, t in zip(starts, shaped, strict=True)]

    def update(self, members: slice, step: int, group: dict[str, Any], skip_zeros: bool) -> None:
        """Update neighbours among the parameters, with gradients, to their `step` with the settings of `group`."""
        start, stop = self.offsets[members.start], self.offsets[members.stop]
        parameters, values = self.parameters[members], self.values[members]
        gradients: list[Any] = [p.grad for p in parameters]
        storage = self.buffer.untyped_storage()
        storage.resize_(self.buffer.nbytes)
        flat_values, flat_gradients = self.buffer[:, start:stop]
        flat_gradients.zero_()
        torch._foreach_copy_(values, parameters)
        torch._foreach_copy_(self.gradients[members], gradients)
        state = {name: self.flat[name][start:stop] for name in _CODES} | self.maps | {"step": step}
        state |= {name: self.flat[name][start // BLOCK : stop // BLOCK] for name in _SCALES}
        _update(flat_values, flat_gradients, state, self.tables, group, skip_zeros)
        torch._foreach_copy_(parameters, values)
        storage.resize_(0)


class _Place(NamedTuple):
    """Where a parameter lies, and the state that was put there."""

    chunk: _Chunk
    index: int
    state: dict[str, Any]
    state1: Tensor

    def holds(self, p: Tensor, state: dict[str, Any]) -> bool:
        """Whether this is still the place of a parameter with this state: neither was replaced."""
        return state is self.state and state.get("state1") is self.state1 and p.dtype is self.chunk.dtype


class _InChunks(Optimizer2State):
    """The step of bitsandbytes' AdamW with small 8-bit tensors updated in chunks, and large ones by a kernel of fastllm
    where it runs.

    `state` holds what bitsandbytes' own class holds, so that each reads the checkpoints of the other. 32-bit and paged
    states, overridden settings and whatever else is not plain go through bitsandbytes' own update one by one. A step
    waits for the GPU only where states are paged.
    """

    args: Any  # of bitsandbytes, a namespace of settings
    # Made by the first step: a turned instance of bitsandbytes' class has not had any.
    _places: dict[Tensor, _Place]
    _tables: dict[torch.device, Tensor | None]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_places", None)
        self.__dict__.pop("_tables", None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW from the gradients of the parameters. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        with _on_default_streams(p.device for group in self.param_groups for p in group["params"]):
            for index, group in enumerate(self.param_groups):
                self._update_group(index, group)
        return loss

    def _update_group(self, index: int, group: dict[str, Any]) -> None:
        places = self.__dict__.setdefault("_places", {})
        placed: list[_Place] = []
        unplaced: list[int] = []
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            place, state = places.get(p), self.state[p]
            if not self._is_plain(index, position, p):
                self._update_alone(index, position, group)
            elif place is not None and place.holds(p, state):
                placed.append(place)
            elif not self._is_8bit(p, state):
                self._update_alone(index, position, group)
            elif p.numel() <= _CHUNK:
                unplaced.append(position)
            else:
                self._update_large(index, position, group)
        placed += self._lay_out(index, group, unplaced)
        for place in placed:
            place.state["step"] += 1
        for run in _runs(placed):
            members = slice(run[0].index, run[-1].index + 1)
            run[0].chunk.update(members, run[0].state["step"], group, self.args.skip_zeros)

    def _is_plain(self, index: int, position: int, p: Tensor) -> bool:
        """Whether a parameter is an ordinary tensor with the settings of its group."""
        overridden = id(p) in self.mng.pid2config or (index, position) in self.mng.index2config
        return not (overridden or self.is_paged) and type(p) in (torch.nn.Parameter, Tensor) and p.is_contiguous()

    def _is_8bit(self, p: Tensor, state: dict[str, Any]) -> bool:
        """Whether a plain parameter has, or will have, 8-bit states in order and with the usual maps."""
        if p.dtype not in _DTYPES:
            return False
        if not state:
            return self.args.optim_bits == 8 and p.numel() >= self.args.min_8bit_size
        codes, scales = ([state.get(name) for name in names] for names in (_CODES, _SCALES))
        return (
            all(t is not None and t.dtype == torch.uint8 and t.shape == p.shape and t.is_contiguous() for t in codes)
            and all(t is not None and t.numel() == _padded(p) // BLOCK for t in scales)
            and self._has_usual_maps(p.device, state)
        )

    def _has_usual_maps(self, device: torch.device, state: dict[str, Any]) -> bool:
        """Whether the codes of a state mean what those of the others mean; a loaded state has maps of its own."""
        for name, qmap in zip(("dynamic", "udynamic"), (state[name] for name in _MAPS), strict=True):
            self.name2qmap[name] = self.name2qmap[name].to(device)
            if qmap is not self.name2qmap[name] and not torch.equal(qmap, self.name2qmap[name]):
                return False
        return True

    def _tables_for(self, p: Tensor) -> Tensor | None:
        """What fastllm's kernel needs to know of the usual maps; None where it does not run or does not know them."""
        if not use_triton(p):
            return None
        tables = self.__dict__.setdefault("_tables", {})
        if p.device not in tables:
            tables[p.device] = code_tables(*(self.name2qmap[name].to(p.device) for name in ("dynamic", "udynamic")))
        return tables[p.device]

    def _lay_out(self, index: int, group: dict[str, Any], positions: Sequence[int]) -> list[_Place]:
        """Put parameters of a group into chunks, with the states they have or with new ones."""
        kinds: defaultdict[tuple, list[int]] = defaultdict(list)
        for position in positions:
            p = group["params"][position]
            kinds[p.dtype, p.device].append(position)
        laid_out = []
        for part in (part for kind in kinds.values() for part in _parts(kind, group["params"])):
            parameters = [group["params"][position] for position in part]
            for position, p in zip(part, parameters, strict=True):
                if not self.state[p]:
                    self.init_state(group, p, index, position)
            states = [self.state[p] for p in parameters]
            chunk = _Chunk(parameters, states, self._tables_for(parameters[0]))
            found = [_Place(chunk, i, state, state["state1"]) for i, state in enumerate(states)]
            self._places.update(zip(parameters, found, strict=True))
            laid_out += found
        return laid_out

    def _update_large(self, index: int, position: int, group: dict[str, Any]) -> None:
        p = group["params"][position]
        if not self.state[p]:
            self.init_state(group, p, index, position)
        state = self.state[p]
        state["step"] += 1
        _update(p, p.grad.contiguous(), state, self._tables_for(p), group, self.args.skip_zeros)

    def _update_alone(self, index: int, position: int, group: dict[str, Any]) -> None:
        """As bitsandbytes' own step; it waits after each tensor, which only states on their way to the host need."""
        p = group["params"][position]
        if not self.state[p]:
            self.init_state(group, p, index, position)
        self.prefetch_state(p)
        self.update_step(group, p, index, position)
        if self.is_paged:
            sync_gpu(p)


class AdamW(_InChunks, bitsandbytes.optim.AdamW):
    """`bitsandbytes.optim.AdamW` with its 8-bit states (`optim_bits=8`) updated in few launches."""


class AdamW8bit(_InChunks, bitsandbytes.optim.AdamW8bit):
    """`bitsandbytes.optim.AdamW8bit` in few launches and without a wait for the GPU.

    Arguments, parameter groups and state dicts are those of bitsandbytes, and so are the bits of every step, as far as
    the docstring of `fastllm.kernels.adam_8bit` says. Parameters of up to 4 M values are updated together, the others
    one by one; while it runs, a step takes 32 MiB at most beside the states.
    """


def update_in_chunks(optimizer: torch.optim.Optimizer) -> bool:
    """Turn a plain 8-bit `AdamW` or `AdamW8bit` of bitsandbytes into the one here. Returns whether it is one."""
    fast = {bitsandbytes.optim.AdamW: AdamW, bitsandbytes.optim.AdamW8bit: AdamW8bit}.get(type(optimizer))
    if fast is None or optimizer.is_paged or optimizer.args.optim_bits != 8:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    optimizer.__class__ = fast
    optimizer.__setstate__({})  # which also makes torch run the hooks of the step of this class
    return True


def _update(
    values: Tensor,
    gradients: Tensor,
    state: dict[str, Any],
    tables: Tensor | None,
    group: dict[str, Any],
    skip_zeros: bool,
) -> None:
    """Update `values`, in order as their `gradients`, and the 8-bit `state` to its step: with `tables` by fastllm's
    kernel, else by bitsandbytes'."""
    lr, beta1, beta2, eps, weight_decay = group["lr"], *group["betas"][:2], group["eps"], group["weight_decay"]
    (state1, state2), (absmax1, absmax2), (qmap1, qmap2) = (
        [state[name] for name in names] for names in (_CODES, _SCALES, _MAPS)
    )
    if tables is not None:
        adam_8bit(
            values, gradients, (state1, state2), (absmax1, absmax2), tables,
            step=state["step"], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
        )  # fmt: skip
    else:
        optimizer_update_8bit_blockwise(
            "adam", gradients, values, state1, state2, beta1, beta2, 0.0, 0.0, eps, state["step"], lr,
            qmap1, qmap2, absmax1, absmax2, weight_decay, skip_zeros=skip_zeros,
        )  # fmt: skip


def _padded(p: Tensor) -> int:
    """Values of the blocks that a parameter fills or begins."""
    return -(-p.numel() // BLOCK) * BLOCK


def _parts(positions: Iterable[int], parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Cut a list of parameters into lists of at most `_CHUNK` values."""
    part, size = [], 0
    for position in positions:
        values = _padded(parameters[position])
        if part and size + values > _CHUNK:
            yield part
            part, size = [], 0
        part.append(position)
        size += values
    if part:
        yield part


def _runs(places: Iterable[_Place]) -> Iterator[list[_Place]]:
    """Neighbours in a chunk that are at the same step, as after steps in which a parameter had no gradient."""
    numbered = enumerate(places)
    keyed = groupby(numbered, lambda item: (id(item[1].chunk), item[1].index - item[0], item[1].state["step"]))
    for _, run in keyed:
        yield [place for _, place in run]


@contextmanager
def _on_default_streams(devices: Iterable[torch.device]) -> Iterator[None]:
    """Run on the default stream of each GPU, behind its current one and before that goes on: bitsandbytes launches its
    updates there, whatever the current stream is."""
    with ExitStack() as stack:
        for device in {device for device in devices if device.type == "cuda"}:
            current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
            if current != default:
                default.wait_stream(current)
                stack.callback(current.wait_stream, default)
                stack.enter_context(torch.cuda.stream(default))
        yield
