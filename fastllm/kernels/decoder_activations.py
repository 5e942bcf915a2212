"""What a decoder layer holds between its forward and its backward, and how its attention half spends that time in host
memory: everything up to the residual stream between the halves comes back instead of being computed again. Where the
link has time for more, so do some rows of gate and up's output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .attention import AttentionResult

Fetch = Callable[[], torch.Tensor]
# Takes tensors to the host, in the order in which they will be wanted back; what fetches each to where it came from.
Offload = Callable[[Sequence[torch.Tensor]], Sequence[Fetch]]


class AwayRows(Protocol):
    """The first rows of a matrix, away in host memory."""

    def start(self) -> torch.Tensor:
        """A new matrix that they are on their way to."""
        ...

    def arrive(self) -> None:
        """Wait for them."""
        ...


# Takes the first rows, as many as said, of a matrix to the host.
OffloadRows = Callable[[torch.Tensor, int], AwayRows]

# What is sent away, in the order in which a backward reads it; `attended` is attention's output as rows. The few values
# a token beside these (statistics of norms and softmax) stay.
_AWAY = ("middle", "attention_out", "attended", "output_low_rank", "qkv", "qkv_raw", "qkv_low_rank", "x")


@dataclass(frozen=True, slots=True, eq=False)
class RowsAway:
    """How many rows of gate and up's output go to the host, and what takes them there."""

    count: int
    offload: OffloadRows


@dataclass(slots=True, eq=False)
class Activations:
    """Everything that a backward reads. Rows are [T, width]; a `low_rank` is x A^T of its group."""

    x: torch.Tensor
    input_rstd: torch.Tensor
    qkv_raw: torch.Tensor | None  # before the head norms, where the layer has them
    query_rstd: torch.Tensor | None
    key_rstd: torch.Tensor | None
    qkv: torch.Tensor
    qkv_low_rank: torch.Tensor | None
    qkv_masks: list[torch.Tensor | None]
    attention: AttentionResult
    output_low_rank: torch.Tensor | None
    output_masks: list[torch.Tensor | None]
    attention_out: torch.Tensor | None  # o's output, where a norm reads it
    attention_out_rstd: torch.Tensor | None
    middle: torch.Tensor  # a, the residual stream after attention
    middle_rstd: torch.Tensor
    gate_up: torch.Tensor | None = None  # freed once its gradient is known; without LoRA's term where that is separate
    gate_up_low_rank: torch.Tensor | None = None
    gate_up_masks: Sequence[torch.Tensor | None] = ()
    down_low_rank: torch.Tensor | None = None
    down_masks: Sequence[torch.Tensor | None] = (None,)
    mlp_out: torch.Tensor | None = None  # down's output, where a norm reads it
    mlp_out_rstd: torch.Tensor | None = None
    rows_away: int = 0  # of gate and up, the first ones, that come back from the host
    _away: dict[str, Fetch] = field(default_factory=dict)
    _shape: tuple[int, ...] = ()  # of attention's output, while that is away
    _rows: AwayRows | None = None
    _coming: AwayRows | None = None

    @property
    def attended(self) -> torch.Tensor:
        """Attention's output as rows [T, heads * head_dim]."""
        return self.attention.rows

    @property
    def is_away(self) -> bool:
        """Whether the attention half is in host memory, and the other is not there at all."""
        return bool(self._away)

    def send_away(self, offload: Offload) -> None:
        """Start to copy the attention half to the host. It stays here, too, for the rest of the forward."""
        leaving = {name: value for name in _AWAY if (value := getattr(self, name)) is not None}
        self._away = dict(zip(leaving, offload(list(leaving.values())), strict=True))
        self._shape = tuple(self.attention.out.shape)

    def send_rows_away(self, away: RowsAway) -> None:
        """Start to copy rows of gate and up's output to the host, too."""
        assert self.gate_up is not None
        self.rows_away, self._rows = away.count, away.offload(self.gate_up, away.count)

    def start_rows_back(self) -> None:
        """Have a new `gate_up` that the rows which are away, if any, are on their way to."""
        if self._rows is not None:
            self.gate_up = self._rows.start()
            self._rows, self._coming = None, self._rows

    def await_rows(self) -> None:
        """Wait for the rows that are on their way back, if any."""
        if self._coming is not None:
            self._coming.arrive()
            self._coming = None

    def let_go(self) -> None:
        """Drop what is on its way to the host, and the other half."""
        for name in self._away:
            if name != "attended":
                setattr(self, name, None)
        self.attention.out = torch.empty(0, device=self.input_rstd.device)
        self.gate_up = self.gate_up_low_rank = None

    def bring_back_middle(self) -> None:
        """Of the attention half, what the backward of the other half reads."""
        self._bring_back("middle", "attention_out")

    def bring_back(self) -> None:
        """All of the attention half; nothing where it never left."""
        self._bring_back(*self._away)

    def _bring_back(self, *names: str) -> None:
        for name in names:
            fetch = self._away.pop(name, None)
            if fetch is None:
                continue
            if name == "attended":
                batch, heads, length, head_dim = self._shape
                self.attention.out = fetch().view(batch, length, heads, head_dim).transpose(1, 2)
            else:
                setattr(self, name, fetch())
