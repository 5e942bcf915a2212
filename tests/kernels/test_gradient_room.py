"""Gradients that layers hand on with room beside them: no copies, and the same bits."""

import copy
import functools

import pytest
import torch

from fastllm.kernels import gradient_room
from fastllm.kernels.decoder_layer import decoder_layer
from fastllm.kernels.gradient_room import GradientRoom, with_room
from fastllm.kernels.projections import Projection, ProjectionGroup

from .layers import Spec, call_of, layer_of, parameters_of
from .parity import Setting

pytestmark = pytest.mark.usefixtures("narrow_extension")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of gradients that had to be copied to a buffer with room."""
    shapes = []

    def copy_rows(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        shapes.append(source.shape)
        return target.copy_(source)

    monkeypatch.setattr(gradient_room, "copy_rows", copy_rows)
    return shapes


def gradients(setting: Setting, room: GradientRoom | None, *, hook=None, spec: Spec = Spec(), calls: int = 3):
    """Of the input and the first layer's adapters, through three layers; `hook` sees the second one's dX."""
    setting = Setting(setting.implementation, setting.dtype, setting.device)
    tensors = parameters_of(setting, spec)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if "lora" in name}
    layer, call = layer_of(spec, tensors), call_of(setting, spec, gradient_room=room)
    leaves["x"] = setting.randn(spec.batch, spec.length, spec.width).requires_grad_()
    hidden = leaves["x"]
    with setting.active():
        for index in range(calls):
            if index == 1 and hook is not None:
                hidden.register_hook(hook)
            hidden = decoder_layer(hidden, layer, call)
        hidden.backward(setting.randn(*hidden.shape))
    return {name: leaf.grad for name, leaf in leaves.items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(tensor.equal(right[name]) for name, tensor in left.items())


DENSE = Spec(weights="dense")


def test_only_the_first_gradient_of_a_backward_is_copied(fp32, copied):
    expected = gradients(fp32, None, spec=DENSE)
    assert len(copied) == 3
    copied.clear()
    room = GradientRoom()
    assert same(gradients(fp32, room, spec=DENSE), expected)
    assert len(copied) == 1
    assert room._buffer is None, "nothing is held after a backward"


@pytest.mark.parametrize(
    ("spec", "copies"),
    [(Spec(weights="dense", has_lora=False), 0), (Spec(dropout=0.2, weights="dense"), 3 + 1)],
    ids=["without adapters", "with dropout"],
)
def test_layers_without_adapters_and_with_dropout(fp32, copied, spec, copies):
    torch.manual_seed(0)
    expected = gradients(fp32, None, spec=spec)
    torch.manual_seed(0)
    assert same(gradients(fp32, GradientRoom(), spec=spec), expected)
    assert len(copied) == copies


def test_a_gradient_that_a_hook_replaces_is_copied(fp32, copied):
    expected = gradients(fp32, None, hook=lambda grad: grad * 2, spec=DENSE)
    copied.clear()
    assert same(gradients(fp32, GradientRoom(), hook=lambda grad: grad * 2, spec=DENSE), expected)
    assert len(copied) == 2


def test_a_gradient_that_is_changed_in_place_is_the_changed_one(fp32, copied):
    expected = gradients(fp32, None, hook=lambda grad: grad * 2, spec=DENSE)
    found = gradients(fp32, GradientRoom(), hook=lambda grad: grad.mul_(2), spec=DENSE)
    assert same(found, expected)


def test_a_sum_of_gradients_is_not_taken_for_one_of_them(fp32):
    """Two paths lead to the input of the second layer."""

    def run(room: GradientRoom | None) -> torch.Tensor:
        setting = Setting(fp32.implementation, fp32.dtype, fp32.device)
        tensors = parameters_of(setting, DENSE)
        layer, call = layer_of(DENSE, tensors), call_of(setting, DENSE, gradient_room=room)
        x = setting.randn(DENSE.batch, DENSE.length, DENSE.width).requires_grad_()
        with setting.active():
            middle = decoder_layer(x, layer, call)
            (decoder_layer(middle, layer, call) + decoder_layer(middle, layer, call) + 3 * middle).sum().backward()
        return x.grad

    assert run(GradientRoom()).equal(run(None))


def test_a_buffer_of_another_layout_is_not_taken(device):
    room, take = GradientRoom(), functools.partial(torch.zeros, device=device)
    room._buffer = take(4, 10)
    gradient = room._buffer[:, :8]
    assert room.take(gradient, 12) is None and room._buffer is None
    room._buffer = take(4, 10)
    assert room.take(room._buffer.view(-1)[:32].view(4, 8), 10) is None
    room._buffer = take(4, 10)
    assert room.take(room._buffer[:, :8].to(torch.float64), 10) is None
    room._buffer = buffer = take(4, 10)
    assert room.take(buffer[:, :8], 10) is buffer and room.take(buffer[:, :8], 10) is None


def test_a_gradient_in_another_dtype_is_cast(device, copied):
    group = ProjectionGroup([Projection(torch.zeros(8, 4, device=device))])
    gradient = torch.randn(3, 8, device=device)
    buffer = with_room(group, gradient, torch.float64, GradientRoom())
    assert buffer[:, :8].equal(gradient.double()) and len(copied) == 1


def test_a_copied_model_has_its_own():
    room = GradientRoom()
    room._buffer = torch.zeros(2, 2)
    assert copy.deepcopy(room)._buffer is None
