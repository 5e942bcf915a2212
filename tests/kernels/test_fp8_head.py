"""The gradient through a frozen head in FP8: which parts are rounded and how much, and what stays as it is."""

import functools

import pytest
import torch

from fastllm.kernels import fp8_head
from fastllm.kernels.fp8 import CAPABILITY
from fastllm.kernels.fp8_head import Fp8Head, LogitGrads, head_obstacle, quantize_transposed
from fastllm.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    PLAIN_LOGITS,
    LogitTransform,
    _token_losses,
    linear_cross_entropy,
    linear_token_losses,
)
from fastllm.kernels.lora import Projection, ProjectionGroup

from .parity import OverLimit, Setting
from .quantized import quantize
from .test_fp8 import ONE_ROUNDING, PRODUCT

pytestmark = [
    # Triton's interpreter computes masked lanes too, in numpy.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY,
        reason="this GPU has no FP8 products",
    ),
]
WIDTH, VOCAB, ROWS = 64, 528, 40
TRANSFORMS = {"plain": PLAIN_LOGITS, "scale": LogitTransform(0.5), "softcap": LogitTransform(softcap=5.0)}


def rel_l2(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def labels_of(setting: Setting, rows: int = ROWS) -> torch.Tensor:
    labels = setting.integers(0, VOCAB, rows)
    labels[::5] = IGNORE_INDEX
    return labels


def logit_grads(logits: torch.Tensor, labels: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """d(sum of losses) / d(logits) in float64."""
    leaf = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(transform.of(leaf), labels, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


def require_near(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as logits in fp32 lead."""
    if not torch.allclose(found.double(), expected.double(), rtol=2e-5, atol=1e-6):
        raise OverLimit(f"{name}: {found}, expected {expected}")


def check_logit_grads(setting: Setting, transform: LogitTransform = PLAIN_LOGITS, vocab: int = VOCAB) -> None:
    """Zero at the label, whose entry is exact; the others within a rounding to e4m3 under the row's scale, by which
    the largest is exact where nothing caps it."""
    logits, labels = setting.randn(ROWS, vocab, scale=2.0), labels_of(setting).clamp(max=vocab - 1)
    labels[1::5] = logits.argmax(-1)[1::5]  # the largest, but not of the others
    expected = logit_grads(logits, labels, transform)
    at_labels = labels.clamp(min=0)[:, None]
    of_labels = expected.gather(1, at_labels)[:, 0]
    others = expected.scatter(1, at_labels, 0.0)
    kept = logits.clone()
    with setting.active():
        grads = LogitGrads.empty(ROWS, vocab, setting.device)
        losses = _token_losses(logits, labels, transform, IGNORE_INDEX, (), write_grad=True, in_fp8=grads)
        plain = _token_losses(kept.clone(), labels, transform, IGNORE_INDEX, (), write_grad=True)
    if not logits.equal(kept):
        raise OverLimit("the logits are others")
    require_near("losses", losses.nll, plain.nll)
    require_near("at the labels", grads.of_labels, of_labels)
    found = grads.others.values.double() * grads.others.scales.double()[:, None]
    bound = others.abs() * 2.0**-4 + grads.others.scales.double()[:, None] * 2.0**-10 + 1e-7
    if not ((found - others).abs() <= bound).all():
        raise OverLimit(f"off by {((found - others).abs() - bound).max()} more than a rounding")
    if found.gather(1, at_labels).any() or found[labels == IGNORE_INDEX].any():
        raise OverLimit("not zero at the labels, or where they are ignored")
    if not transform.softcap:
        require_near("the largest", found.abs().amax(1), others.abs().amax(1))
    if (error := rel_l2(found, others)) > ONE_ROUNDING:
        raise OverLimit(f"{error} of the others")


def check_sure_rows(setting: Setting) -> None:
    """Of rows so sure of their labels that the other entries leave fp32's range nothing but zeros is left."""
    logits, labels = setting.randn(ROWS, VOCAB), labels_of(setting).clamp(min=0)
    above = torch.linspace(80, 108, ROWS, device=setting.device).to(setting.dtype)
    logits.scatter_(1, labels[:, None], above[:, None])
    with setting.active():
        grads = LogitGrads.empty(ROWS, VOCAB, setting.device)
        _token_losses(logits, labels, PLAIN_LOGITS, IGNORE_INDEX, (), write_grad=True, in_fp8=grads)
    found = grads.others.values.double() * grads.others.scales.double()[:, None]
    if not (found.isfinite().all() and found.abs().max() < 1e-30 and grads.of_labels.abs().max() < 1e-6):
        raise OverLimit("gradients of rows that are sure")


def test_rows_that_are_sure_of_their_labels(setting):
    check_sure_rows(setting)


@pytest.mark.parametrize("vocab", [VOCAB, 16, 4112, 8192])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_gradients_of_logits(setting, transform, vocab):
    check_logit_grads(setting, transform, vocab)


def test_range_is_that_of_the_others(fp32):
    """The label nearly certain, most others a thousandth of the largest: all of them keep their bits."""
    logits, labels = fp32.randn(4, VOCAB), torch.zeros(4, dtype=torch.long, device=fp32.device)
    logits[:, 0], logits[:, 1] = 25.0, 8.0
    others = logit_grads(logits, labels, PLAIN_LOGITS)
    others[:, 0] = 0.0
    with fp32.active():
        grads = LogitGrads.empty(4, VOCAB, fp32.device)
        _token_losses(logits, labels, PLAIN_LOGITS, IGNORE_INDEX, (), write_grad=True, in_fp8=grads)
    found = grads.others.values.double() * grads.others.scales.double()[:, None]
    assert rel_l2(found[:, 2:], others[:, 2:]) < ONE_ROUNDING
    torch.testing.assert_close(found[:, 1], others[:, 1], rtol=1e-4, atol=0.0)


def test_a_bad_logit_stays_visible(fp32):
    logits, labels = fp32.randn(3, VOCAB), torch.zeros(3, dtype=torch.long, device=fp32.device)
    logits[1, 5] = float("nan")
    with fp32.active():
        grads = LogitGrads.empty(3, VOCAB, fp32.device)
        _token_losses(logits, labels, PLAIN_LOGITS, IGNORE_INDEX, (), write_grad=True, in_fp8=grads)
    found = grads.others.dequantized(torch.float32)
    assert found[1].isnan().any() and found[0].isfinite().all() and found[2].isfinite().all()


def check_head_transposed(setting: Setting, rows: int, columns: int, *, spare: int = 0) -> None:
    """The least power of two that lets the largest value in, and every value within its rounding, transposed."""
    weight = setting.randn(rows, columns + spare)[:, spare:]
    with setting.active():
        found = quantize_transposed(weight)
    expected = 2.0 ** torch.ceil(torch.log2(weight.double().abs().max().cpu() / 448))
    if not (found.scales.cpu().double() == expected).all():
        raise OverLimit(f"scales {found.scales}, expected {expected}")
    value = found.dequantized(torch.float64)
    bound = weight.t().double().abs() * 2.0**-4 + float(expected) * 2.0**-10
    if not ((value - weight.t().double()).abs() <= bound).all():
        raise OverLimit("off by more than a rounding")


@pytest.mark.parametrize("shape", [(1, 16), (48, 80), (130, 67)], ids=str)
def test_transposed_weight(setting, shape):
    check_head_transposed(setting, *shape)
    check_head_transposed(setting, *shape, spare=3)


def hidden_grads(
    setting: Setting, *, per_row: bool = False, least_rows: int = 1, **options: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss or losses, gradient of the hidden states) of the same head and batch each time."""
    again = Setting(setting.implementation, setting.dtype, setting.device)
    hidden = again.randn(ROWS, WIDTH).requires_grad_()
    head = ProjectionGroup([Projection(again.randn(VOCAB, WIDTH, scale=2 * WIDTH**-0.5))])
    labels, upstream = labels_of(again), again.randn(ROWS, dtype=torch.float32)
    with again.active(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_head, "_LEAST_ROWS", least_rows)
        if per_row:
            loss = linear_token_losses(hidden, head, labels, **options).nll
            loss.backward(upstream)
        else:
            loss = linear_cross_entropy(hidden, head, labels, num_items=1, **options)
            loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def check_hidden_grads(setting: Setting, *, per_row: bool = False) -> None:
    """The same losses; gradients as near as the product of two rounded matrices."""
    loss, expected = hidden_grads(setting, per_row=per_row)
    again, found = hidden_grads(setting, per_row=per_row, fp8_gradient=True)
    require_near("losses", again, loss)
    if not 1e-4 < (error := rel_l2(found, expected)) < PRODUCT:
        raise OverLimit(f"gradients are off by {error}")


def check_label_rows(setting: Setting) -> None:
    """They come from the rounded weight, as the product does: the whole is the gradient of one matrix."""
    weight, labels = setting.randn(VOCAB, WIDTH), labels_of(setting)
    grads = LogitGrads.empty(ROWS, VOCAB, setting.device)
    whole = setting.randn(ROWS, VOCAB, dtype=torch.float32)
    whole.scatter_(1, labels.clamp(min=0)[:, None], -30.0)  # as large as all others together
    whole[labels == IGNORE_INDEX] = 0.0
    grads.fill(whole, labels, IGNORE_INDEX)
    out = torch.empty(ROWS, WIDTH + 8, device=setting.device)[:, 3 : 3 + WIDTH]
    with setting.active():
        head = Fp8Head(weight)
        head.hidden_grad(grads, labels, IGNORE_INDEX, out=out)
    rounded = head._transposed.dequantized(torch.float64).t()
    expected = grads.others.dequantized(torch.float64) @ rounded
    label_part = grads.of_labels.double()[:, None] * rounded[labels.clamp(min=0)]
    # The product is rounded to the compute dtype, and its tensor cores sum in fewer bits.
    allowed = 2e-3 * expected.norm() + torch.finfo(setting.dtype).eps * expected.norm()
    if (error := (out.double() - expected - label_part).norm()) > allowed:
        raise OverLimit(f"off by {error}, allowed {allowed}")


def test_label_rows(setting):
    check_label_rows(setting)


@pytest.mark.parametrize("per_row", [False, True], ids=["mean", "rows"])
def test_gradients_of_hidden_states(setting, per_row):
    check_hidden_grads(setting, per_row=per_row)


@pytest.mark.parametrize("least_rows", [ROWS, ROWS + 1])
def test_short_batches_have_gradients_in_16_bits(fp32, least_rows):
    """Rows whose labels are ignored count where they are computed."""
    _, plain = hidden_grads(fp32)
    _, found = hidden_grads(fp32, fp8_gradient=True, least_rows=least_rows)
    assert found.equal(plain) == (least_rows > ROWS)


def test_heads_that_have_it_in_16_bits(device):
    new = functools.partial(torch.zeros, device=device)
    heads = {
        None: Projection(new(32, 16), new(32)),
        "the head is trained": Projection(new(32, 16).requires_grad_()),
        "the head has an adapter": Projection(new(32, 16), None, new(4, 16), new(32, 4)),
        "the head has a size that is no multiple of 16": Projection(new(33, 16)),
        "the head is 4-bit": Projection(quantize(new(32, 64) + 1)[0]),
    }
    for reason, projection in heads.items():
        assert head_obstacle(ProjectionGroup([projection])) == reason
