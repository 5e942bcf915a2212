"""The random numbers of a device, read and replayed: a recomputed forward draws the masks of the first one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def random_state(device: torch.device) -> torch.Tensor:
    """The state of torch's generator for `device`, on the host."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replayed(state: torch.Tensor | None, device: torch.device) -> Iterator[None]:
    """Draw as from `state` inside, and go on afterwards as if nothing had been drawn. None changes nothing."""
    if state is None:
        yield
        return
    present = random_state(device)
    _set(state, device)
    try:
        yield
    finally:
        _set(present, device)


def _set(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
