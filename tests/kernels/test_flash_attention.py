"""fastllm's own attention kernel: documents, windows and capped scores, beside a dense mask in float64."""

import functools

import pytest
import torch

from fastllm.kernels import flash_attention, tensor_tiles
from fastllm.kernels.attention import (
    AttentionCase,
    attention,
    attention_backward,
    attention_forward,
    choose_backend,
)
from fastllm.kernels.dispatch import backend
from fastllm.kernels.documents import Documents
from fastllm.kernels.flash_attention import (
    flash_attention_backward,
    flash_attention_forward,
    flash_attention_is_fastest,
)

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


@pytest.fixture(params=["addresses", "descriptors"])
def tiles(request: pytest.FixtureRequest, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> str:
    """How tiles reach the kernels: those of Hopper take descriptors, and are for two bytes an element."""
    described = request.param == "descriptors"
    if described and setting.dtype == torch.float32:
        pytest.skip("fp32 tiles are always read by their addresses")
    if described and setting.device.type == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    monkeypatch.setattr(flash_attention, "is_hopper", lambda x: described)
    return request.param


@pytest.mark.parametrize("name", NARROWED)
def test_under_autograd(setting, name):
    """Chosen where no library serves the case; here that is all of them."""
    case, inputs, upstream, plain = narrowed(setting, name, FEW_HEADS)
    if setting.device.type == "cpu":
        with setting.active():
            assert choose_backend(*inputs.values(), case) == "triton"
    check_op(lambda q, k, v: attention(q, k, v, case), plain, setting, inputs, LIMITS, upstream=(upstream,))


@pytest.mark.parametrize("name", NARROWED)
def test_two_functions(setting, tiles, name):
    check_narrowed(setting, name, "triton", FEW_HEADS)


@pytest.mark.parametrize("name", ["window", "softcap", "capped_rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(setting, tiles, shape, name):
    if setting.dtype == torch.float32 and SHAPES[shape][-1] > 128:
        pytest.skip("fp32 heads are at most 128 wide")
    check_narrowed(setting, name, "triton", SHAPES[shape])


@pytest.mark.parametrize("name", LONG)
def test_tiles_without_masks(setting, tiles, name):
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


def test_views_of_joined_projections(setting, tiles):
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


def test_columns_of_wider_rows(setting, tiles):
    """Heads whose own gradients begin at no multiple of 16 bytes."""
    wide_rows = [setting.randn(1, 37, 2, 16).transpose(1, 2) for _ in range(4)]
    found = []
    with setting.active():
        for change in (torch.Tensor.contiguous, lambda t: t):
            q, k, v, dout = (change(t[..., :12]) for t in wide_rows)
            out, lse = flash_attention_forward(q, k, v, scaling=0.3)
            found.append((out, *flash_attention_backward(dout, out, lse, q, k, v, scaling=0.3)))
    assert all(map(torch.equal, *found))


def test_the_same_bits_on_every_run_and_whatever_stands_beside(setting, tiles):
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


def test_where_it_is_the_fastest(device, monkeypatch):
    """Causal heads of the widths that were measured on Hopper, where no mask and no dropout are in the way."""
    monkeypatch.setattr(flash_attention, "is_hopper", lambda x: True)
    q = torch.zeros(1, 2, 9, 128, dtype=torch.bfloat16, device=device)
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).to(device), 1)
    cases = [AttentionCase(0.1, documents=documents), AttentionCase(0.1, sliding_window=3)]
    with backend("triton"):
        for case in cases:
            assert choose_backend(q, q, q, case) == "triton"
        assert flash_attention_is_fastest(q, q, q, causal=True)
        for other in (q[..., :96], q[..., 4:68], q.float()):
            assert not flash_attention_is_fastest(other, other, other, causal=True)
        assert not flash_attention_is_fastest(q, q, q, causal=False)


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


def test_the_order_of_programs_changes_no_bit(device, monkeypatch):
    """Heads side by side, in groups that the number of heads is no multiple of."""
    setting, found = Setting("triton", torch.bfloat16, device), []
    q, k, v, dout = (setting.randn(1, 70, 3, 16).transpose(1, 2) for _ in range(4))
    for abreast in (1, 2, 3, 4):
        monkeypatch.setattr(flash_attention, "_CACHE", abreast * 2 * 70 * 16 * q.element_size())
        with setting.active():
            out, lse = flash_attention_forward(q, k, v, scaling=0.2)
            found.append(flash_attention_backward(dout, out, lse, q, k, v, scaling=0.2))
    for results in found[1:]:
        assert all(map(torch.equal, found[0], results))


@pytest.mark.parametrize(
    ("change", "is_aligned"),
    [
        (lambda t: t, True),
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), True),
        (lambda t: t[:, :, 1:], True),
        (lambda t: t[..., 1:], False),
        (lambda t: t[..., :12].contiguous(), False),
        (lambda t: t[:, :1].expand(-1, 3, -1, -1), False),
        (lambda t: t.transpose(2, 3), False),
    ],
    ids=["plain", "rows", "later_rows", "odd_begin", "odd_rows", "expanded", "strided"],
)
def test_what_can_be_described(change, is_aligned, device):
    """Rows that begin at multiples of 16 bytes, which the copy engine asks for."""
    t = change(torch.zeros(2, 3, 16, 32, dtype=torch.bfloat16, device=device))
    assert tensor_tiles.alignment(t) == (8 if is_aligned else 1)
    assert tensor_tiles.alignment(torch.zeros(2, 3, 16, 32, device=device)) == 4


on_few_heads = functools.partial(check_narrowed, backend="triton", shape=FEW_HEADS)
on_long_rows = functools.partial(check_narrowed, backend="triton", shape=LONG_ROWS)


def on_all_programs(setting: Setting) -> None:
    check_narrowed(setting, "two_rows", "triton", (2, 2, 61, 32))


KERNEL_BUGS = {
    "future_seen": Bug(
        "        end = queries + 1\n", "        end = queries + 2\n", lambda setting: on_few_heads(setting, "softcap")
    ),
    "scaling_missing": Bug(
        "soft_capped(product * scaling, ", "soft_capped(product * 1.0, ",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "scaling_missing_without_a_cap": Bug(
        "product, _in_base_2(scaling)", "product, _in_base_2(1.0)", lambda setting: on_few_heads(setting, "window")
    ),
    "scores_of_base_e": Bug(
        "scores * 1.4426950408889634", "scores * 1.0", lambda setting: on_few_heads(setting, "window")
    ),
    "full_tiles_past_the_diagonal": Bug(
        "| (key + BLOCK_N > full_stop):\n            keys = key + tl.arange(0, BLOCK_N)\n            first, end ="
        " _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)\n            seen",
        "| (key > full_stop):\n            keys = key + tl.arange(0, BLOCK_N)\n            first, end ="
        " _keys_seen_by(queries, starts_ptr, ends_ptr, batch, length, window, HAS_DOCUMENTS, CAUSAL)\n            seen",
        lambda setting: on_long_rows(setting, "long_rows"),
    ),
    "full_tiles_before_the_query": Bug(
        "if (query < full_start) |", "if (query < start) |", lambda setting: on_long_rows(setting, "long_rows")
    ),
    "full_tiles_past_the_window": Bug(
        "| (query + BLOCK_M > full_stop)", "| (query > full_stop)",
        lambda setting: on_long_rows(setting, "long_window"),
    ),
    "sum_not_rescaled": Bug(
        "total * rescale + tl.sum", "total + tl.sum", lambda setting: on_few_heads(setting, "softcap")
    ),
    "values_not_rescaled": Bug(
        "acc=out * rescale[:, None]", "acc=out", lambda setting: on_few_heads(setting, "softcap")
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
        "            p *= soft_cap_slope(scores, softcap)\n        dp =", "            p *= 1.0\n        dp =",
        lambda setting: on_few_heads(setting, "softcap"),
    ),
    "first_head_of_the_group_only": Bug(
        "head += is_last.to(tl.int32)", "head += 0", lambda setting: on_few_heads(setting, "softcap")
    ),
    "delta_missing": Bug(
        "delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)",
        "delta = tl.sum(out.to(tl.float32) * 0.0, axis=1)", lambda setting: on_few_heads(setting, "softcap"),
    ),
    "programs_of_one_head": Bug("first + within % count", "first", on_all_programs),
}  # fmt: skip
TILE_BUGS = {
    "next_head_s_memory": Bug(
        "length, WIDTH, ROWS, BLOCK_E), other=0.0)", "length, 2 * WIDTH, ROWS, BLOCK_E), other=0.0)",
        lambda setting: check_narrowed(setting, "window", "triton", SHAPES["odd_head"]),
    ),
    "statistics_of_the_first_head": Bug(
        "        first = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride\n",
        "        first = batch.to(tl.int64) * batch_stride\n", lambda setting: on_few_heads(setting, "softcap"),
    ),
}  # fmt: skip
BUGS = {
    name: (module, bug)
    for module, bugs in (("flash_attention_kernels", KERNEL_BUGS), ("tensor_tiles", TILE_BUGS))
    for name, bug in bugs.items()
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a bug that reads past a tensor ends the CUDA context")
@pytest.mark.parametrize(("module", "bug"), BUGS.values(), ids=BUGS.keys())
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    setting = Setting("triton", torch.float32, device)
    plant(f"fastllm.kernels.{module}", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        bug.check(setting)
