"""A recording serves fewer rows than it was made for, one forward after the other."""

import pytest
import torch

from fastllm.kernels import gradient_room
from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.decoder_layer import DecoderPass, decoder_layer
from fastllm.kernels.documents import Documents
from fastllm.kernels.gradient_room import GradientRoom
from fastllm.kernels.recorded_inputs import SharedInputs, rounded
from fastllm.kernels.recorded_pass import RecordedPass
from fastllm.kernels.vision_block import BlockCall

from .parity import Setting
from .repetition import repeat
from .test_decoder_layer import Spec, layer_of, parameters_of
from .test_decoder_layer import call_of as layer_call

ROWS = 16


class Scaling:
    """y = x * weight, as a pass that keeps its input only."""

    def __init__(self, weight):
        self.weight = weight

    def forward(self, x, call):
        return x * self.weight.detach(), None, "none"

    def backward(self, dy, x, call, kept, backend, needs):
        return dy * self.weight.detach(), [(dy * x).sum(0)]


def call_of(rows):
    documents = Documents.whole_rows(1, rows, torch.device("cpu"))
    return rounded(BlockCall(AttentionCase(1.0, documents=documents, causal=False)), ROWS)


@pytest.mark.parametrize("lengths", [[11, 5, 16, 2], [16, 3, 3]])
def test_gradients_are_those_of_the_given_rows(lengths):
    """Whatever a longer batch left behind it."""
    weight = torch.randn(4, requires_grad=True)
    recorded = None
    for rows in lengths:
        x, upstream = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
        if recorded is None:
            recorded = RecordedPass(Scaling(weight), x, call_of(rows), [weight], SharedInputs(ROWS), repeat)
        y = recorded(x, call_of(rows))
        found = torch.autograd.grad(y, (x, weight), upstream)
        expected = torch.autograd.grad(x * weight, (x, weight), upstream)
        torch.testing.assert_close(y, x * weight, rtol=0, atol=0)
        torch.testing.assert_close(found, expected)


def test_gradients_pass_from_layer_to_layer_through_two_buffers():
    weights = [torch.randn(4, requires_grad=True) for _ in range(5)]
    shared, recorded = SharedInputs(), []
    for step in range(3):
        x, upstream = torch.randn(ROWS, 4, requires_grad=True), torch.randn(ROWS, 4)
        y, expected = x, x
        for index, weight in enumerate(weights):
            if step == 0:
                recorded.append(RecordedPass(Scaling(weight), y, call_of(ROWS), [weight], shared, repeat))
            y, expected = recorded[index](y, call_of(ROWS)), expected * weight
        found = torch.autograd.grad(y, (x, *weights), upstream)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (x, *weights), upstream))
    assert len({gradient.data_ptr() for one in recorded for gradient in one._dx}) == 2


def test_a_recording_computes_without_autocast():
    class Seeing(Scaling):
        def forward(self, x, call):
            assert not torch.is_autocast_enabled("cpu")
            return super().forward(x, call)

    weight = torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        RecordedPass(Seeing(weight), torch.randn(ROWS, 4), call_of(ROWS), [weight], SharedInputs(ROWS), repeat)


def test_decoder_layers_write_gradients_where_the_next_one_reads_them(device, monkeypatch):
    """With the room that it wants beside them: only the first gradient of a backward is copied."""
    setting = Setting("triton" if device.type == "cuda" else "reference", torch.float32, device)
    copies, real = [], gradient_room.copy_rows
    monkeypatch.setattr(gradient_room, "copy_rows", lambda *rows: copies.append(rows) or real(*rows))
    spec = Spec(weights="dense")
    tensors = parameters_of(setting, spec)
    # On a GPU others can't be recorded.
    choice = {"choose_backend": lambda *_: "triton"} if device.type == "cuda" else {}
    layer, call = layer_of(spec, tensors), layer_call(setting, spec, gradient_room=GradientRoom(), **choice)
    trained = [tensor.requires_grad_() for name, tensor in tensors.items() if "lora" in name]
    shared, recorded = SharedInputs(), []
    for step in range(2):
        x, upstream = (setting.randn(spec.batch, spec.length, spec.width) for _ in range(2))
        results = []
        for is_recorded in (False, True):
            y = x.clone().requires_grad_()
            first = y
            with setting.active():
                for index in range(3):
                    if is_recorded and step == 0:
                        one = DecoderPass(layer, setting.dtype)
                        recorded.append(RecordedPass(one, y, call, layer.parameters(), shared, repeat))
                    y = recorded[index](y, call) if is_recorded else decoder_layer(y, layer, call)
                copies.clear()
                results.append(torch.autograd.grad(y, (first, *trained), upstream))
            assert len(copies) == 1
        assert all(map(torch.equal, *results))
