"""What a trained language-model head takes of the GPU's memory."""

import pytest
import torch

from fastllm.kernels.linear_cross_entropy import linear_cross_entropy
from fastllm.kernels.lora import Projection, ProjectionGroup


@pytest.mark.gpu
def test_the_gradient_of_a_trained_head_takes_its_own_bytes_in_the_backward():
    """Its sum in fp32 is there already; a product of that in fp32 would be the largest tensor of a step."""
    weight = torch.randn(32768, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(64, device="cuda")
    for _ in range(2):  # the first call also holds workspaces
        loss = linear_cross_entropy(hidden, ProjectionGroup([Projection(weight)]), labels)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weight_grad, _ = torch.autograd.grad(loss, (weight, hidden))
        most = torch.cuda.max_memory_allocated() - before
    assert weight_grad.nbytes <= most < 1.1 * weight_grad.nbytes
