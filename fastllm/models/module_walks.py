"""What trainers ask of a whole model in every step, without the generators and attribute writes of torch.

An adapter on each projection makes thousands of modules of a model: torch's own walks take longer than small steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_PLAIN_TRAIN = (nn.Module.train, PreTrainedModel.train)


class FastWalks:
    """Mixed into the class of a `PeftModel`. Its methods give what those of `nn.Module` give, in the same order."""

    def parameters(self: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
        if not recurse:
            yield from super().parameters(recurse=False)  # pyright: ignore[reportAttributeAccessIssue]
            return
        yield from (p for _, p in _owned_parameters(self))

    def train(self: Any, mode: bool = True) -> Any:
        if not isinstance(mode, bool):
            return super().train(mode)  # pyright: ignore[reportAttributeAccessIssue]
        set_training(self, mode)
        return self


def modules_of(root: nn.Module) -> list[nn.Module]:
    """The modules of `root.modules()`, in that order."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append(module)
        children = module._modules
        if children:
            waiting.extend(reversed(children.values()))
    return found


def set_training(root: nn.Module, mode: bool) -> None:
    """`nn.Module.train` of a root, whatever its class makes of it; classes below that have their own are asked."""
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if type(module).train not in _PLAIN_TRAIN and module is not root:
            module.train(mode)
            continue
        if module.training is not mode:
            module.training = mode
        children = module._modules
        if children:
            waiting.extend(reversed(children.values()))


def count_parameters(root: Any, *, only_trainable: bool, exclude_embeddings: bool) -> int:
    """`PreTrainedModel.num_parameters`."""
    total, is_4bit = 0, getattr(root, "is_loaded_in_4bit", False)
    for module, p in _owned_parameters(root):
        is_excluded = exclude_embeddings and isinstance(module, nn.Embedding) and p is module.weight
        if not is_excluded and (p.requires_grad or not only_trainable):
            # Two values of a 4-bit weight share a byte.
            total += 2 * p.nbytes if is_4bit and hasattr(p, "quant_state") else p.numel()
    return total


def _owned_parameters(root: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Each parameter once, with the first module that has it."""
    seen: set[int] = set()
    for module in modules_of(root):
        for p in module._parameters.values():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield module, p
