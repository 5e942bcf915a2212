"""A recording serves fewer rows than it was made for, one forward after the other."""

import pytest
import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.documents import Documents
from fastllm.kernels.recorded_inputs import SharedInputs, rounded
from fastllm.kernels.recorded_pass import RecordedPass
from fastllm.kernels.vision_block import BlockCall

from .repetition import repeat

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
