"""Attention through xformers: a double with its documented interface here, the real one on GPUs that have it."""

import importlib.machinery
import inspect
import sys
import types

import pytest
import torch

from fastllm._notices import forget_notices
from fastllm.kernels.attention import AttentionCase, choose_backend
from fastllm.kernels.xformers_attention import xformers_ops, xformers_runs

from ..planting import Bug, plant
from . import eager
from .conftest import DTYPES, see_capability
from .parity import OverLimit, Setting
from .test_attention import SHAPES, check_two_functions


class LowerTriangularMask:
    pass


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    """[B, S, H, E] in and out, as many key heads as query heads, no dropout: what the real one insists on."""
    assert query.dim() == 4 and key.shape == value.shape and query.shape[2:] == key.shape[2:]
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    assert p == 0.0 and (attn_bias is None or isinstance(attn_bias, LowerTriangularMask))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    scores = (eager.at_least_fp32(q) @ eager.at_least_fp32(k).transpose(2, 3)) * scale
    if attn_bias is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ eager.at_least_fp32(v)).to(q.dtype)
    return out.transpose(1, 2).contiguous(), scores.logsumexp(-1)


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
):
    assert grad.shape == output.shape == query.shape and lse.shape == (*query.transpose(1, 2).shape[:3],)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out, _ = memory_efficient_attention_forward_requires_grad(*leaves, attn_bias=attn_bias, p=p, scale=scale)
    return torch.autograd.grad(out, leaves, grad)


@pytest.fixture
def fresh_lookup():
    """What is installed is looked up once; here it changes."""
    forget_notices()
    for known in (xformers_ops, xformers_runs):
        known.cache_clear()
    yield
    for known in (xformers_ops, xformers_runs):
        known.cache_clear()


@pytest.fixture
def double(monkeypatch, fresh_lookup) -> types.ModuleType:
    """`xformers.ops` as an installed package, whatever this machine has."""
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.__spec__ = importlib.machinery.ModuleSpec("xformers", None)
    for part in (
        LowerTriangularMask, memory_efficient_attention_forward_requires_grad, memory_efficient_attention_backward,
    ):  # fmt: skip
        setattr(ops, part.__name__, part)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


@pytest.fixture
def turing(monkeypatch):
    """A GPU as choose_backend sees it: no flash, no cuDNN; a query, a key and a value on it by shape and dtype. What
    is tried on their device runs on the CPU."""
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: None)
    for name, answer in {"flash": False, "cudnn": False, "efficient": True}.items():
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda params, answer=answer: answer)
    monkeypatch.setattr(torch.version, "hip", None)
    see_capability(monkeypatch, 7, 5)

    def tensors(dtype: torch.dtype = torch.float16, head_dim: int = 64) -> list:
        shapes = [torch.Size((1, n, 32, head_dim)) for n in (8, 2, 2)]
        device = torch.device("cpu")
        return [types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape, device=device) for shape in shapes]

    return tensors


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, causal, double, device):
    check_two_functions(Setting("auto", dtype, device), shape, None, "xformers", causal=causal)


def test_chosen_where_torch_has_no_flash_kernel(turing, double, capsys):
    assert choose_backend(*turing(), AttentionCase(0.125)) == "xformers"
    assert "through xformers" in capsys.readouterr().out


def test_left_alone_where_it_does_not_serve(turing, double, monkeypatch):
    """Dropout, bf16 before Ampere, GPUs it has no kernels for, deterministic mode; and where torch has flash."""
    case = AttentionCase(0.125)
    assert choose_backend(*turing(), AttentionCase(0.125, dropout=0.1)) == "efficient"
    assert choose_backend(*turing(torch.bfloat16), case) == "efficient"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(*turing(), case) == "efficient"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    see_capability(monkeypatch, 12, 0)
    assert choose_backend(*turing(), case) == "efficient"
    see_capability(monkeypatch, 8, 0)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: True)
    assert choose_backend(*turing(), case) == "flash"


def test_not_installed(turing, monkeypatch, fresh_lookup):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(*turing(), AttentionCase(0.125)) == "efficient"


def test_installed_for_another_torch(turing, double, monkeypatch, capsys):
    """A package that fails to load is told about once and done without."""
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    for _ in range(2):
        assert choose_backend(*turing(), AttentionCase(0.125)) == "efficient"
    assert capsys.readouterr().out.count("does not load") == 1


def test_built_without_kernels_for_this_gpu(turing, double, monkeypatch, capsys):
    """It loads, and refuses every call."""

    def refuse(*args, **kwargs):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")

    monkeypatch.setattr(double, "memory_efficient_attention_forward_requires_grad", refuse)
    for _ in range(2):
        assert choose_backend(*turing(), AttentionCase(0.125)) == "efficient"
    assert capsys.readouterr().out.count("has no float16 attention for this GPU and torch") == 1


BUGS = {
    "scale_missing": Bug(
        "scale=scaling\n    )\n    return out", "scale=1.0\n    )\n    return out", check_two_functions
    ),
    "heads_and_rows_exchanged": Bug(
        "return out.transpose(1, 2), lse", "return out.view_as(q), lse", check_two_functions
    ),
    "gradients_of_k_and_v_exchanged": Bug(
        "dk.transpose(1, 2), dv.transpose(1, 2)", "dv.transpose(1, 2), dk.transpose(1, 2)", check_two_functions
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_noticed(bug, double, device, monkeypatch, tmp_path):
    plant("fastllm.kernels.xformers_attention", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        bug.check(Setting("auto", torch.float32, device), "grouped", None, "xformers")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [name for name, (*_, width) in SHAPES.items() if width % 8 == 0])
def test_the_real_one_matches_float64(shape, dtype, causal, device, fresh_lookup):
    pytest.importorskip("xformers.ops")
    if not xformers_runs(device, dtype):
        pytest.skip("the installed xformers has no kernels for this GPU and torch")
    check_two_functions(Setting("auto", dtype, device), shape, None, "xformers", causal=causal)


@pytest.mark.parametrize(
    "name", ["memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward"]
)
def test_the_double_has_the_real_signature(name):
    real = pytest.importorskip("xformers.ops")
    assert list(inspect.signature(getattr(real, name)).parameters) == list(
        inspect.signature(globals()[name]).parameters
    )
