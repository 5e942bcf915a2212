"""What calibration data shows of a model: how strong the inputs of each linear layer are, and how much its outputs
matter.

One pass over the data collects E[x_j^2] by forward hooks and E[g_i^2] by backward ones, g the gradient of the
log-likelihood of labels that are drawn from the model's own predictions (the diagonal of the Fisher information). The
input of an embedding is a token, so what counts there is the squared gradient at the places of each token. No weight
gets a gradient, so this fits wherever the model can be trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .._errors import ArgumentError, DataError
from ..gguf.importance import SecondMoments
from ..text.encoding import RowEncoder
from ..text.loading import load_chat_data
from .adapted_weights import training_precision


@dataclass(frozen=True)
class CalibrationData:
    """Rows to calibrate on: texts, or a data set in any format that `load_chat_data` reads. `max_length` tokens are
    run at a time."""

    rows: Any
    num_samples: int = 512
    max_length: int = 512


def calibration_data(rows: Any, num_samples: int, max_length: int) -> CalibrationData | None:
    """The arguments of a saving method; None where there are no rows."""
    return None if rows is None else CalibrationData(rows, num_samples, max_length)


@dataclass
class Moments:
    """E[x^2] of each column and E[g^2] of each row of linear weights, by the weight's name; of stacked experts, by the
    expert, E[x^2] over the tokens that it met and E[g^2] over all tokens. `scales` holds, once for each row, what a
    common factor of the weight does: the mean square of sum g y over a chunk, y the output, divided by its tokens.
    `embeddings` holds for each row of an embedding E[g^2] where it was read, times how often a token is that one."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tokens: int = 0


def calibrate(model: Any, tokenizer: Any, data: CalibrationData, *, gradients: bool) -> Moments:
    """Run the data through a transformers model with or without PEFT's layers in it, as it is now.

    Errors: `DataError` for rows that can't be read, `ArgumentError` for other arguments that make no sense.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or data.max_length
    chunks = token_chunks(tokenizer, data, min(data.max_length, longest))
    inputs, outputs, embedding = SecondMoments(), OutputMoments(), model.get_input_embeddings()
    rows = torch.zeros(embedding.weight.shape[0], device=model.device)
    generator = torch.Generator(model.device).manual_seed(0)
    with _watched(model, inputs, outputs if gradients else None) as embedded, torch.set_grad_enabled(gradients):
        for chunk in tqdm(chunks, desc="calibrating", unit="chunk", delay=1):
            with training_precision(model):
                logits = model(input_ids=chunk.to(model.device), use_cache=False).logits[0].float()
            if gradients:
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                F.cross_entropy(logits, labels, reduction="sum").backward(inputs=embedded)
                for gradient in (hidden.grad for hidden in embedded if hidden.grad is not None):
                    rows.index_add_(0, chunk[0].to(rows.device), gradient[0].float().square().mean(-1))
            embedded.clear()
    num_tokens = sum(chunk.shape[1] for chunk in chunks)
    if not gradients:
        return Moments(inputs.means(), num_tokens=num_tokens)
    name = next(name for name, module in model.named_modules() if module is embedding)
    # Gemma's embedding scales what it reads, and so every change of a row.
    scale = float(getattr(embedding, "embed_scale", 1.0))
    embeddings = {f"{name}.weight": rows * (scale**2 / num_tokens)}
    of_rows, of_wholes = outputs.gradients.shares(num_tokens), outputs.scales(num_tokens)
    return Moments(inputs.means(), of_rows, of_wholes, embeddings, num_tokens)


class OutputMoments:
    """What gradients at the outputs of linear layers say: E[g^2] of each row, and of each weight as a whole the squared
    derivative by a factor that all of it has."""

    def __init__(self) -> None:
        self.gradients = SecondMoments()
        self._squares: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, products: torch.Tensor, gradient: torch.Tensor, *, parts: int = 1, expert: int | None = None,
        num_experts: int = 1,
    ) -> None:  # fmt: skip
        """The `products` [..., rows] of a weight and the gradient of a chunk's loss at them. `parts` weights may lie
        one after the other in the rows, with a factor each."""
        flat = gradient.reshape(-1, gradient.shape[-1])
        experts = None if expert is None else torch.full((len(flat),), expert, device=flat.device)
        self.gradients.add(name, flat, experts=experts, num_experts=num_experts)
        derivatives = (flat.float() * products.reshape(flat.shape).float()).sum(0)
        squares = self._squares.setdefault(name, torch.zeros(num_experts, len(derivatives), device=flat.device))
        squares[expert or 0] += derivatives.view(parts, -1).sum(1).square().repeat_interleave(len(derivatives) // parts)

    def scales(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """The same value for each row of a weight: fp32 [rows], or [experts, rows], on the CPU."""
        means = {name: (squares / num_tokens).cpu() for name, squares in self._squares.items()}
        return {name: mean[0] if len(mean) == 1 else mean for name, mean in means.items()}


def token_chunks(tokenizer: Any, data: CalibrationData, length: int) -> list[torch.Tensor]:
    """The data as token ids [1, length], documents one after the other; the last chunk may be shorter."""
    for name in ("num_samples", "max_length"):
        value = getattr(data, name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ArgumentError(f"{name} is {value!r}, not a positive whole number", where="calibration")
    ids = [token for row in _encoded(tokenizer, data) for token in row]
    if len(ids) < 2:
        raise DataError("the calibration data has no text", where="calibration_dataset")
    return [torch.tensor([ids[start : start + length]]) for start in range(0, len(ids), length)]


def _encoded(tokenizer: Any, data: CalibrationData) -> Iterator[list[int]]:
    if isinstance(data.rows, str | bytes | Mapping) or not isinstance(data.rows, Iterable):
        raise ArgumentError(
            f"got a {type(data.rows).__name__}", where="calibration_dataset",
            fix="pass one data set, or a list of texts",
        )  # fmt: skip
    rows: list[Any] = list(islice(data.rows, data.num_samples))
    if rows and all(isinstance(row, str) for row in rows):
        rows = [{"text": row} for row in rows]
    if rows and all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        yield from ([int(token) for token in row["input_ids"]] for row in rows)
        return
    encoder = RowEncoder(tokenizer, train_on="all")
    for row in encoder.encode(list(load_chat_data(rows, show=False))):
        if isinstance(row, DataError):
            raise row
        yield row.input_ids


def linear_layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name without PEFT, module to watch) of each linear layer; an adapted one is watched as a whole."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None) or module
    if isinstance(inner, nn.Linear):
        yield name, module
        return
    for child_name, child in inner.named_children():
        yield from linear_layers(child, f"{name}.{child_name}" if name else child_name)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name without PEFT, module) of each stack of experts: `gate_up_proj` [E, 2 F, D], `down_proj` [E, D, F]."""
    for name, module in model.named_modules():
        stacks = [getattr(module, part, None) for part in ("gate_up_proj", "down_proj")]
        is_plain = getattr(module, "is_concatenated", False) and not (module.is_transposed or module.has_bias)
        if is_plain and all(isinstance(stack, torch.Tensor) and stack.dim() == 3 for stack in stacks):
            yield name.replace(".base_layer", ""), module


def run_experts(
    experts: Any,
    watch: Callable[[str, torch.Tensor, torch.Tensor, int], None],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The forward of transformers' stacked experts, one expert after the other: `watch(stack, rows, products, expert)`
    sees what goes into each product and what comes out."""
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj  # an adapter is added each time they are read
    result = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        tokens, places = (top_k_index == expert).nonzero(as_tuple=True)
        rows = hidden_states[tokens]
        gate_up = F.linear(rows, gate_up_proj[expert])
        watch("gate_up_proj", rows, gate_up, expert)
        inner = experts._apply_gate(gate_up)
        down = F.linear(inner, down_proj[expert])
        watch("down_proj", inner, down, expert)
        weighted = down * top_k_weights[tokens, places, None]
        result = result.index_add(0, tokens, weighted.to(result.dtype))
    return result


def _bias(module: Any) -> torch.Tensor | float:
    """Of the linear layer that `linear_layers` watches as `module`."""
    inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None) or module
    return 0.0 if inner.bias is None else inner.bias.detach()


@contextmanager
def _watched(model: Any, inputs: SecondMoments, outputs: OutputMoments | None) -> Iterator[list[torch.Tensor]]:
    """The model in evaluation mode with hooks. Yields the list that each forward appends its embedded tokens to: with
    `outputs`, these are where a backward may end."""
    embedded: list[torch.Tensor] = []

    def see_embedding(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_(outputs is not None))
        return embedded[-1]

    def watch_linear(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        inputs.add(f"{name}.weight", args[0])
        if outputs is not None:
            products = output.detach() - _bias(module)
            output.register_hook(functools.partial(outputs.add, f"{name}.weight", products))

    def watch_expert(name: str, count: int, stack: str, rows: torch.Tensor, output: torch.Tensor, index: int) -> None:
        ids = torch.full((len(rows),), index, device=rows.device)
        inputs.add(f"{name}.{stack}", rows, experts=ids, num_experts=count)
        if outputs is not None:
            place = {"expert": index, "num_experts": count, "parts": 2 if stack == "gate_up_proj" else 1}
            output.register_hook(functools.partial(outputs.add, f"{name}.{stack}", output.detach(), **place))

    with ExitStack() as undo:
        for name, module in linear_layers(model):
            hook = module.register_forward_hook(functools.partial(watch_linear, name))
            undo.callback(hook.remove)
        for name, module in expert_layers(model):
            watch = functools.partial(watch_expert, name, module.num_experts)
            undo.enter_context(_forward_of(module, functools.partial(run_experts, module, watch)))
        undo.callback(model.get_input_embeddings().register_forward_hook(see_embedding).remove)
        undo.callback(model.train, model.training)
        model.eval()
        yield embedded


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """This one module with another forward."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
