"""fastllm's own attention kernel: documents, windows and capped scores, beside a dense mask in float64."""

import functools

import pytest
import torch

from fastllm.kernels.attention import (
    AttentionCase,
    attention,
    attention_backward,
    attention_forward,
    choose_backend,
)
from fastllm.kernels.dispatch import backend
from fastllm.kernels.flash_attention import flash_attention_forward

from ..planting import Bug, plant
from .conftest import SETTINGS
from .parity import OverLimit, Setting, check_op, run
from .test_attention import LIMITS, LONG, NARROWED, check_narrowed, narrowed

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FEW_HEADS = (2, 1, 61, 32)
LONG_ROWS = (1, 1, 270, 32)
# (query heads, key heads, length, head dim): rows of several tiles, heads that fill no power of two, the widest.
SHAPES = {
    "one_token": (2, 2, 1, 64),
    "several_tiles": (2, 1, 140, 64),
    "odd_head": (3, 1, 37, 20),
    "head_of_96": (2, 2, 70, 96),
    "head_of_128": (1, 1, 131, 128),
    "head_of_256": (1, 1, 67, 256),
}


@pytest.fixture(params=[name for name in SETTINGS if name.startswith("triton")])
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton has no tensor cores here")
    return Setting(*SETTINGS[request.param], device)


@pytest.mark.parametrize("name", NARROWED)
def test_under_autograd(setting, name):
    """Chosen where no library serves the case; here that is all of them."""
    case, inputs, upstream, plain = narrowed(setting, name, FEW_HEADS)
    if setting.device.type == "cpu":
        with setting.active():
            assert choose_backend(*inputs.values(), case) == "triton"
    check_op(lambda q, k, v: attention(q, k, v, case), plain, setting, inputs, LIMITS, upstream=(upstream,))


@pytest.mark.parametrize("name", NARROWED)
def test_two_functions(setting, name):
    check_narrowed(setting, name, "triton", FEW_HEADS)


@pytest.mark.parametrize("name", ["window", "softcap", "capped_rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(setting, shape, name):
    if setting.dtype == torch.float32 and SHAPES[shape][-1] > 128:
        pytest.skip("fp32 heads are at most 128 wide")
    check_narrowed(setting, name, "triton", SHAPES[shape])


@pytest.mark.parametrize("name", LONG)
def test_tiles_without_masks(setting, name):
    check_narrowed(setting, name, "triton", LONG_ROWS)


def test_a_cap_far_above_the_scores_changes_nothing(setting):
    """tanh keeps the digits of what is small."""
    tensors = [setting.randn(1, 2, 33, 64) for _ in range(3)]
    found = []
    for softcap in (1e4, 0.0):
        with setting.active():
            out, _ = flash_attention_forward(*tensors, scaling=0.125, softcap=softcap)
        found.append(out.float())
    eps = torch.finfo(setting.dtype).eps
    assert float((found[0] - found[1]).norm()) <= 2 * eps * float(found[1].norm())


def test_views_of_joined_projections(setting):
    """q, k and v as columns of one buffer, the gradient of the output with strides of its own."""
    case, inputs, upstream, _ = narrowed(setting, "packed", FEW_HEADS)
    rows = [t.transpose(1, 2).flatten(2) for t in inputs.values()]
    joined = torch.cat([*rows, rows[0]], dim=-1).split([r.shape[-1] for r in (*rows, rows[0])], dim=-1)
    views = [part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in joined[:3]]
    found = []
    with setting.active():
        for (q, k, v), dout in ((inputs.values(), upstream), (views, upstream.contiguous())):
            result = attention_forward(q, k, v, case, "triton", needs_backward=True)
            found.append((result.out, *attention_backward(result, dout, q, k, v, case)))
    assert all(map(torch.equal, *found))


def test_the_same_bits_on_every_run_and_whatever_stands_beside(setting):
    """No atomics; and a document's results do not depend on other documents of the row."""
    case, inputs, upstream, _ = narrowed(setting, "packed", FEW_HEADS)
    first = slice(0, 31)
    found = []
    with setting.active():
        for scale in (1.0, 1.0, -3.0):
            changed = {name: torch.cat([t[:, :, first], t[:, :, 31:] * scale], dim=2) for name, t in inputs.items()}
            results = run(lambda q, k, v: attention(q, k, v, case), changed, (upstream,))
            found.append(results)
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name
        assert value[:, :, first].equal(found[2][name][:, :, first]), name


def test_left_to_the_reference(device):
    """Dropout, wide fp32 heads, float64, and GPUs without tensor cores that Triton knows."""
    case = AttentionCase(0.1, softcap=2.0)
    q = torch.empty(1, 1, 3, 256, dtype=torch.float16, device=device)
    with backend("triton"):
        assert choose_backend(q, q, q, case) == "triton"
        assert choose_backend(q, q, q, AttentionCase(0.1, softcap=2.0, dropout=0.1)) == "autograd"
        for other in (q.float(), q.double()):
            assert choose_backend(other, other, other, case) == "autograd"
        assert choose_backend(q, q, q, AttentionCase(0.1)) != "triton"
    with backend("reference"):
        assert choose_backend(q, q, q, case) == "autograd"


on_few_heads = functools.partial(check_narrowed, backend="triton", shape=FEW_HEADS)
on_long_rows = functools.partial(check_narrowed, backend="triton", shape=LONG_ROWS)
BUGS = {
    "future_seen": Bug(
        "return (keys <= queries) &", "return (keys <= queries + 1) &",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "scaling_missing": Bug(
        "soft_capped(product * scaling, ", "soft_capped(product * 1.0, ",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "scaling_missing_without_a_cap": Bug(
        "product * _in_base_2(scaling)", "_in_base_2(product)", lambda setting: on_few_heads(setting, "window")
    ),
    "full_tiles_past_the_diagonal": Bug(
        "full_stop = row + 1 if", "full_stop = row + BLOCK_M if", lambda setting: on_long_rows(setting, "long_rows")
    ),
    "full_tiles_before_the_window": Bug(
        "full_start = tl.max(tl.where(live, first, 0), axis=0)", "full_start = tl.min(first, axis=0)",
        lambda setting: on_long_rows(setting, "long_window"),
    ),
    "full_tiles_past_the_document": Bug(
        "else tl.min(tl.where(live, end, length), axis=0)", "else tl.max(end, axis=0)",
        lambda setting: on_long_rows(setting, "long_segments"),
    ),
    "tiles_behind_the_full_ones_in_their_place": Bug(
        "start, end - before * BLOCK)", "start, start)", lambda setting: on_long_rows(setting, "long_window")
    ),
    "sum_not_rescaled": Bug(
        "total * rescale + tl.sum", "total + tl.sum", lambda setting: on_few_heads(setting, "softcap")
    ),
    "window_off_by_one": Bug(
        "first = tl.maximum(first, queries - window + 1)", "first = tl.maximum(first, queries - window)",
        lambda setting: on_few_heads(setting, "window"),
    ),
    "starts_of_the_first_row": Bug(
        "first = tl.load(starts_ptr + batch * length + queries", "first = tl.load(starts_ptr + queries",
        lambda setting: check_narrowed(setting, "two_rows", "triton", FEW_HEADS),
    ),
    "documents_leak_in_the_backward": Bug(
        "    if HAS_DOCUMENTS:\n        end =", "    if False:\n        end =",
        lambda setting: check_narrowed(setting, "packed", "triton", FEW_HEADS),
    ),
    "images_see_the_one_after": Bug(
        "elif HAS_DOCUMENTS:\n        end =", "elif False:\n        end =",
        lambda setting: on_few_heads(setting, "segments"),
    ),
    "images_leak_in_the_backward": Bug(
        "elif HAS_DOCUMENTS:\n        first =", "elif False:\n        first =",
        lambda setting: on_few_heads(setting, "segments"),
    ),
    "slope_of_the_cap_missing": Bug(
        "            if HAS_CAP:\n                ds *=", "            if False:\n                ds *=",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "first_head_of_the_group_only": Bug(
        "head = key_head * groups + member", "head = key_head * groups",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "delta_missing": Bug(
        "delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)",
        "delta = tl.sum(out.to(tl.float32) * 0.0, axis=1)", lambda setting: on_few_heads(setting, "softcap"),
    ),
    "next_head_s_memory": Bug(
        "live = (rows < length)[:, None] & (cols < width)[None, :]\n    at = base + rows.to(tl.int64)[:, None]"
        " * row_stride + cols[None, :]\n    return",
        "live = (rows < length)[:, None] & (cols < 2 * width)[None, :]\n    at = base + rows.to(tl.int64)[:, None]"
        " * row_stride + cols[None, :]\n    return",
        lambda setting: check_narrowed(setting, "window", "triton", SHAPES["odd_head"]),
    ),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a bug that reads past a tensor ends the CUDA context")
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_noticed(bug, device, monkeypatch, tmp_path):
    setting = Setting("triton", torch.float32, device)
    plant("fastllm.kernels.flash_attention", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        bug.check(setting)
