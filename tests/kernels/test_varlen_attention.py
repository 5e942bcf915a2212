"""Attention through torch's flash kernel for sequences of many lengths: a double of it here, the real one on GPUs."""

import dataclasses
import types

import pytest
import torch

from fastllm.kernels import varlen_attention
from fastllm.kernels.attention import AttentionCase, attention, choose_backend
from fastllm.kernels.documents import Documents
from fastllm.kernels.varlen_attention import varlen_backward, varlen_forward

from ..planting import Bug, plant
from . import eager
from .conftest import DTYPES, see_capability
from .parity import OverLimit, Setting, run, wide
from .test_attention import NARROWED, check_narrowed, narrowed

SERVED = [name for name, (*_, softcap) in NARROWED.items() if not softcap]


def _flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    """[T, H, E] in and out, document by document, with what the real one insists on."""
    assert query.dim() == 3 and cum_seq_q.dtype == torch.int32 and cum_seq_q.equal(cum_seq_k)
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    assert max_q == max_k == int(cum_seq_q.diff().max()) and dropout_p == 0.0
    parts, lses = [], []
    groups = query.shape[1] // key.shape[1]
    for begin, end in zip(cum_seq_q[:-1].tolist(), cum_seq_q[1:].tolist(), strict=True):
        q, k, v = (eager.at_least_fp32(t[begin:end]).transpose(0, 1) for t in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = distance >= 0 if is_causal or window_size_right == 0 else torch.ones_like(distance, dtype=torch.bool)
        if window_size_left >= 0:
            seen &= distance <= window_size_left
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype))
        lses.append(scores.logsumexp(-1))
    unused = query.new_zeros(())
    return torch.cat(parts), torch.cat(lses, 1), unused, unused, unused


def _flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale, window_size_left, window_size_right,
):  # fmt: skip
    assert grad_out.shape == out.shape == query.shape and logsumexp.shape == (query.shape[1], query.shape[0])
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        again, *_ = _flash_attention_forward(
            *leaves, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, False, scale=scale,
            window_size_left=window_size_left, window_size_right=window_size_right,
        )  # fmt: skip
    return torch.autograd.grad(again, leaves, grad_out)


@pytest.fixture
def double(monkeypatch):
    operators = types.SimpleNamespace(
        _flash_attention_forward=_flash_attention_forward, _flash_attention_backward=_flash_attention_backward
    )
    monkeypatch.setattr(varlen_attention, "aten", operators)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU as choose_backend sees it, with a flash kernel; q, k, v on it by shape and dtype."""
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: None)
    for kernel in ("flash", "cudnn", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{kernel}_attention", lambda params: True)
    monkeypatch.setattr(torch.version, "hip", None)
    see_capability(monkeypatch, 8, 0)

    def tensors(dtype=torch.bfloat16, width=64, length=32, heads=8):
        return [
            types.SimpleNamespace(
                is_cuda=True,
                is_xpu=False,
                dtype=dtype,
                shape=torch.Size((1, n, length, width)),
                device=torch.device("cpu"),
            )
            for n in (heads, 2, 2)
        ]

    return tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", SERVED)
def test_matches_float64(name, dtype, double):
    check_narrowed(Setting("auto", dtype, torch.device("cpu")), name, "varlen")


def test_under_autograd(double, monkeypatch):
    """Layers that are not one node reach the same kernel."""
    monkeypatch.setattr("fastllm.kernels.attention.choose_backend", lambda *args: "varlen")
    case, inputs, upstream, plain = narrowed(Setting("auto", torch.float32, torch.device("cpu")), "packed_window")
    ours = run(lambda q, k, v: attention(q, k, v, case), inputs, (upstream,))
    for name, value in run(plain, wide(inputs), (upstream.double(),)).items():
        torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("window", "causal"), [(0, True), (4, True), (0, False)])
def test_the_operators_take_these_arguments(window, causal):
    """The real operators on tensors without data: names, order and shapes."""
    q, k, v = (torch.empty(2, 6, n, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2) for n in (8, 2, 2))
    documents = Documents(torch.empty(4, dtype=torch.int32, device="meta"), 6, 2, 6)
    out, saved = varlen_forward(q, k, v, documents, scaling=0.1, window=window, causal=causal)
    assert out.shape == q.shape
    grads = varlen_backward(out, out, saved, q, k, v, documents, scaling=0.1, window=window, causal=causal)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_chosen_for_documents_and_windows(ampere, monkeypatch):
    """Whatever the flash kernel can't do goes elsewhere."""
    packed = AttentionCase(0.1, documents=Documents(torch.tensor([0, 5, 32], dtype=torch.int32), 27, 1, 32))
    window = AttentionCase(0.1, sliding_window=8)
    images = dataclasses.replace(packed, causal=False)
    for case in (packed, window, images):
        assert choose_backend(*ampere(), case) == "varlen"
        assert choose_backend(*ampere(torch.float32), case) != "varlen"
        assert choose_backend(*ampere(width=60), case) != "varlen"
        assert choose_backend(*ampere(length=2**21, heads=16), case) != "varlen"
    assert choose_backend(*ampere(), AttentionCase(0.1)) == "flash"
    assert choose_backend(*ampere(), AttentionCase(0.1, softcap=20.0)) != "varlen"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(*ampere(), packed) != "varlen"


BUGS = {
    "window_one_too_wide": Bug("return window - 1", "return window if window else -1", "window"),
    "gradients_of_k_and_v_exchanged": Bug(
        "_by_head(dq, q), _by_head(dk, k), _by_head(dv, v)",
        "_by_head(dq, q), _by_head(dv, v), _by_head(dk, k)", "packed",
    ),
    "images_causal_in_the_backward": Bug(
        "longest, longest, dropout, causal,\n", "longest, longest, dropout, True,\n", "segments"
    ),
    "window_missing_in_the_backward": Bug(
        "rng_state, unused, scale=scaling, window_size_left=_left(window)",
        "rng_state, unused, scale=scaling, window_size_left=-1", "window",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_noticed(bug, double, monkeypatch, tmp_path):
    setting = Setting("auto", torch.float32, torch.device("cpu"))
    plant("fastllm.kernels.varlen_attention", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        check_narrowed(setting, bug.check, "varlen")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_the_real_one_matches_float64(name, dtype, device):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch has no flash kernel for this GPU")
    check_narrowed(Setting("auto", dtype, device), name, "varlen")
