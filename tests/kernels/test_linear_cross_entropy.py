"""Language-model head and cross-entropy in one op."""

import contextlib
import dataclasses
from dataclasses import dataclass

import pytest
import torch

from fastllm.kernels import linear_cross_entropy as module
from fastllm.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    PLAIN_LOGITS,
    LabelCount,
    LogitTransform,
    chunk_rows,
    few_rows,
    linear_cross_entropy,
    linear_token_losses,
)
from fastllm.kernels.lora import Projection, ProjectionGroup

from ..determinism import deterministic
from . import eager
from .parity import Limit, OverLimit, Setting, check_op, errors_of, wide
from .quantized import dequantized, quantize

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("narrow_extension")]

WIDTH = 64


@dataclass(frozen=True)
class Case:
    """A head and a batch. `weights` is "dense", "trained" or "nf4"; `trained` heads may have a bias and a LoRA."""

    rows: int = 67
    vocab: int = 521
    ignored: float = 0.3
    weights: str = "dense"
    has_bias: bool = False
    rank: int = 0
    transform: LogitTransform = PLAIN_LOGITS
    is_skipping: bool = True
    loss_scale: float = 1.0
    autocast: bool = False
    labels_stride: int = 1

    @property
    def plain_options(self) -> dict[str, float]:
        return {"scale": self.transform.scale, "softcap": self.transform.softcap}


def head_tensors(setting: Setting, case: Case) -> dict[str, torch.Tensor]:
    """Logits of about N(0, 2), as a trained head makes them; with a LoRA, half of them come from it."""
    dtype = torch.float32 if case.autocast else None
    tensors = {"weight": setting.randn(case.vocab, WIDTH, scale=2 * WIDTH**-0.5, dtype=dtype)}
    if case.has_bias:
        tensors["bias"] = setting.randn(case.vocab, dtype=dtype)
    if case.rank:
        tensors["lora_a"] = setting.randn(case.rank, WIDTH, scale=WIDTH**-0.5, dtype=dtype)
        tensors["lora_b"] = setting.randn(case.vocab, case.rank, scale=case.rank**-0.5 / 2, dtype=dtype)
    return tensors


def labels_of(setting: Setting, case: Case) -> torch.Tensor:
    labels = setting.integers(0, case.vocab, case.rows * case.labels_stride)[:: case.labels_stride]
    labels[torch.rand(case.rows, generator=setting.generator).to(labels.device) < case.ignored] = IGNORE_INDEX
    return labels


def head_of(tensors: dict) -> ProjectionGroup:
    projection = Projection(
        tensors["weight"], tensors.get("bias"), tensors.get("lora_a"), tensors.get("lora_b"), scaling=2.0
    )
    return ProjectionGroup([projection])


def limits_of(setting: Setting, case: Case, count: int, *, per_row: bool) -> dict[str, Limit]:
    """Losses are fp32. Those of rows are off by the rounding of their logits, as eager's are; a mean of 4,096 by 1e-5,
    in fp32 by 1e-7, and of fewer rows by as much more as chance allows. Gradients round with the logits, as logits'
    gradients and as results: 2 floors are 3.3e-3 in bf16.

    With a bias or a LoRA ours and eager round at different places, and either may be the luckier one.
    """
    is_adapted = case.rank > 0 or case.has_bias
    luck = 2.0 if is_adapted else 1.05
    figure = (1e-7 if setting.dtype == torch.float32 else 1e-5) * max(1.0, (4096 / max(count, 1)) ** 0.5)
    gradient = Limit(2.0, 4e-6, eager=1.25 if is_adapted else 1.1, rel_max=4.0 if is_adapted else 2.0)
    mean = Limit(1.0, figure * luck, eager=2.0, rel_max=2.0)
    return {
        "y": Limit(1.0, 1e-7, eager=luck, rel_max=2.0) if per_row else mean,
        "dhidden": gradient,
        "dweight": gradient if is_adapted else Limit(2.0, 1e-6, eager=1.01, rel_max=2.0),
        **dict.fromkeys(("dbias", "dlora_a", "dlora_b"), gradient),
    }


def check_loss(setting: Setting, case: Case, *, per_row: bool = False) -> None:
    """The loss and the gradients of hidden and of every trainable tensor of the head.

    `per_row` checks the losses of the rows instead of their mean, with an upstream gradient for each row.
    """
    trained, frozen, dense = head_tensors(setting, case), {}, {}
    if case.weights != "trained":
        weight = frozen["weight"] = dense["weight"] = trained.pop("weight")
        if case.weights == "nf4":
            frozen["weight"], packed, state = quantize(weight.float())
            dense["weight"] = dequantized(packed, state, setting.dtype)
    labels = labels_of(setting, case)
    count = int((labels != IGNORE_INDEX).sum())
    hidden = setting.randn(case.rows, WIDTH, dtype=torch.float32 if case.autocast else None)
    upstream = setting.randn(case.rows, dtype=torch.float32) if per_row else torch.tensor(1.0, device=labels.device)
    upstream = upstream * case.loss_scale

    def context(x: torch.Tensor) -> contextlib.AbstractContextManager:
        if case.autocast and x.dtype != torch.float64:
            return torch.autocast(x.device.type, setting.dtype)
        return contextlib.nullcontext()

    def op(hidden: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        options = {"transform": case.transform, "valid_rows": count if case.is_skipping else None}
        with context(hidden):
            if per_row:
                return linear_token_losses(hidden, head_of(frozen | leaves), labels, **options).nll
            return linear_cross_entropy(hidden, head_of(frozen | leaves), labels, **options)

    def plain(hidden: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        tensors = (wide(dense) if hidden.dtype == torch.float64 else dense) | leaves
        with context(hidden):
            logits = eager.lora_linear(
                hidden, tensors["weight"], *(tensors.get(name) for name in ("bias", "lora_a", "lora_b")), scaling=2.0
            )
            losses = eager.cross_entropy(logits, labels, **case.plain_options)
        return losses if per_row else losses.sum() / max(count, 1)

    inputs = {"hidden": hidden, **trained}
    limits = limits_of(setting, case, count, per_row=per_row)
    limits = {name: limits[name] for name in ("y", *(f"d{name}" for name in inputs))}
    check_op(op, plain, setting, inputs, limits, upstream=(upstream,), computed_in=setting.dtype)


CASES = {
    "plain": Case(),
    "one_row": Case(rows=1, ignored=0.0),
    "nothing_ignored": Case(ignored=0.0),
    "ignored_rows_computed": Case(is_skipping=False),
    "past_a_block": Case(rows=19, vocab=4097),
    "two_blocks": Case(rows=19, vocab=8192),
    "softcap": Case(transform=LogitTransform(softcap=5.0)),
    "scale": Case(transform=LogitTransform(scale=0.0625)),
    "scale_and_softcap": Case(transform=LogitTransform(scale=1.7, softcap=5.0), is_skipping=False),
    "trained": Case(weights="trained"),
    "trained_bias": Case(weights="trained", has_bias=True, is_skipping=False),
    "trained_softcap": Case(weights="trained", transform=LogitTransform(softcap=5.0)),
    "lora": Case(rank=5),
    "lora_bias_trained": Case(weights="trained", rank=5, has_bias=True),
    "nf4": Case(weights="nf4"),
    "nf4_lora": Case(weights="nf4", rank=5),
}


def scaled_for(setting: Setting, case: Case) -> Case:
    """fp16 trains under a loss scale: without one, eager's gradients underflow."""
    return dataclasses.replace(case, loss_scale=1024.0) if setting.dtype == torch.float16 else case


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_mean_loss(setting, case):
    check_loss(setting, scaled_for(setting, case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_of_rows(setting, case):
    check_loss(setting, scaled_for(setting, case), per_row=True)


def test_loss_of_many_rows(setting):
    """The line for the mean loss itself; Triton's interpreter affords an eighth of the rows."""
    is_interpreted = setting.implementation == "triton" and setting.device.type == "cpu"
    case = Case(rows=512 if is_interpreted else 4096, vocab=151, ignored=0.0, weights="trained")
    check_loss(setting, scaled_for(setting, case))


@pytest.mark.parametrize(
    "case", [Case(weights="trained"), Case(rank=5), Case(weights="nf4")], ids=["trained", "lora", "nf4"]
)
def test_autocast(setting, case):
    """fp32 hidden states and master weights: the loss and the gradients come back in fp32."""
    if setting.dtype != torch.float32:
        check_loss(setting, dataclasses.replace(scaled_for(setting, case), autocast=True))


@pytest.fixture
def chunks_of_16(monkeypatch):
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("per_row", [False, True], ids=["mean", "rows"])
@pytest.mark.parametrize("rows", [15, 16, 17, 32, 33, 65])
def test_chunk_boundaries(setting, rows, per_row, chunks_of_16):
    assert chunk_rows(521) == 16
    case = Case(rows=rows, ignored=0.0, weights="trained")
    check_loss(setting, scaled_for(setting, case), per_row=per_row)


def test_adapted_head_over_chunks(setting, chunks_of_16):
    check_loss(setting, scaled_for(setting, Case(weights="trained", rank=3, has_bias=True)))


def test_chunk_size():
    """About 2^27 logits, never fewer than 1,024 rows; whole batches of small vocabularies."""
    assert chunk_rows(151_936) == 1024
    assert chunk_rows(32_000) * 32_000 == pytest.approx(2**27, rel=0.07)
    assert chunk_rows(2) >= 2**20
    assert few_rows(256_000) == 128 and few_rows(2**30) == 64


def test_small_chunks_where_memory_counts(fp32, monkeypatch):
    """Of a short batch, and not in deterministic mode, where every way of keeping gives the same bits."""
    sizes, real = [], module._token_losses

    def noting(logits, *others, **options):
        sizes.append(len(logits))
        return real(logits, *others, **options)

    monkeypatch.setattr(module, "_token_losses", noting)
    monkeypatch.setattr(module, "_FEW_ELEMENTS", 64 * 521)
    head = ProjectionGroup([Projection(fp32.randn(521, 32))])
    hidden, labels = fp32.randn(150, 32).requires_grad_(), fp32.integers(0, 520, 150)

    def gradient(**options) -> torch.Tensor:
        sizes.clear()
        with fp32.active():
            return torch.autograd.grad(linear_cross_entropy(hidden, head, labels, **options), hidden)[0]

    expected = gradient()
    assert sizes == [150]
    torch.testing.assert_close(gradient(spares_memory=True), expected)
    assert sizes == [64, 64, 22]
    with deterministic():
        assert gradient(spares_memory=True).equal(expected) and sizes == [150]
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 128)
    gradient(spares_memory=True)
    assert sizes == [150], "not of a long one"


def test_strided_labels(fp32):
    """Labels that are every second number of a longer tensor."""
    check_loss(fp32, Case(labels_stride=2, is_skipping=False))
    check_loss(fp32, Case(labels_stride=2, is_skipping=False, weights="trained"), per_row=True)


def test_upstream_gradient_of_a_sum(fp32):
    """`nll.sum()` sends one number to every row, with stride 0; the head's gradient reads it row by row."""
    case = Case(weights="trained", is_skipping=False)
    labels, tensors = labels_of(fp32, case), head_tensors(fp32, case)
    hidden, weight = fp32.randn(case.rows, WIDTH).requires_grad_(), tensors["weight"].requires_grad_()
    with fp32.active():
        linear_token_losses(hidden, head_of(tensors), labels).nll.sum().backward()
        by_rows = hidden.grad, weight.grad
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, head_of(tensors), labels, num_items=1).backward()
    torch.testing.assert_close(by_rows, (hidden.grad, weight.grad))


@pytest.mark.parametrize("valid_rows", [None, 0], ids=["computed", "skipped"])
@pytest.mark.parametrize("per_row", [False, True], ids=["mean", "rows"])
def test_everything_ignored(setting, valid_rows, per_row):
    """An exact zero and zero gradients, also where the batch's number of labels, 0, is given."""
    case = Case(ignored=1.1, weights="trained", has_bias=True, rank=3)
    labels, tensors = labels_of(setting, case), head_tensors(setting, case)
    leaves = [setting.randn(case.rows, WIDTH), *tensors.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    with setting.active():
        if per_row:
            loss = linear_token_losses(leaves[0], head_of(tensors), labels, valid_rows=valid_rows).nll.sum()
        else:
            loss = linear_cross_entropy(
                leaves[0],
                head_of(tensors),
                labels,
                valid_rows=valid_rows,
                num_items=torch.zeros((), device=labels.device),
            )
        loss.backward()
    assert loss.item() == 0.0
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("num_items", [7, 7.0, "tensor"])
def test_number_of_items(fp32, num_items):
    """Under gradient accumulation the sum is divided by the labels of the whole batch, not of this part."""
    case = Case()
    labels, head = labels_of(fp32, case), head_of(head_tensors(fp32, case))
    hidden = fp32.randn(case.rows, WIDTH)
    if num_items == "tensor":
        num_items = torch.tensor(7, device=labels.device)
    with fp32.active():
        given = linear_cross_entropy(hidden, head, labels, num_items=num_items)
        mean = linear_cross_entropy(hidden, head, labels)
    torch.testing.assert_close(given * 7, mean * (labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("ignore_index", [-1, 0, 520])
def test_other_ignore_index(fp32, ignore_index):
    case = Case(ignored=0.0)
    labels, tensors = labels_of(fp32, case), head_tensors(fp32, case)
    labels[::3] = ignore_index
    hidden = fp32.randn(case.rows, WIDTH)
    with fp32.active():
        nll = linear_token_losses(hidden, head_of(tensors), labels, ignore_index=ignore_index).nll
    expected = eager.cross_entropy(hidden @ tensors["weight"].t(), labels, ignore_index=ignore_index)
    torch.testing.assert_close(nll, expected)
    assert not nll[::3].any()


def check_statistics(setting: Setting, case: Case) -> None:
    """Entropy and top-1 of each row's distribution, against their definitions on float64 logits."""
    labels, tensors = labels_of(setting, case), head_tensors(setting, case)
    hidden = setting.randn(case.rows, WIDTH)
    logits = hidden.double() @ tensors["weight"].double().t() * case.transform.scale
    if case.transform.softcap:
        logits = case.transform.softcap * torch.tanh(logits / case.transform.softcap)
    labels[::2] = torch.where(labels[::2] == IGNORE_INDEX, labels[::2], logits.argmax(-1)[::2])
    counted = labels != IGNORE_INDEX
    with setting.active():
        losses = linear_token_losses(
            hidden, head_of(tensors), labels, transform=case.transform, statistics=("entropy", "is_top1"),
            valid_rows=int(counted.sum()) if case.is_skipping else None,
        )  # fmt: skip
    assert losses.entropy is not None and losses.is_top1 is not None
    log_probabilities = logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1) * counted
    figure = 1e-6 if setting.dtype == torch.float32 else 4 * torch.finfo(setting.dtype).eps
    if not errors_of(losses.entropy, entropy).rel_l2 <= figure:
        raise OverLimit(f"entropy: {errors_of(losses.entropy, entropy)}")
    best, second = logits.topk(2).values.unbind(-1)
    is_clear = best - second > 8 * torch.finfo(setting.dtype).eps * best  # else rounding may change the order
    assert is_clear.float().mean() > 0.3
    if not (losses.is_top1 == ((logits.argmax(-1) == labels) & counted))[is_clear].all():
        raise OverLimit("is_top1 differs from argmax")


def test_a_cap_far_above_the_logits_changes_nothing(fp32):
    """tanh keeps the digits of what is small."""
    case = Case(is_skipping=False)
    labels, head = labels_of(fp32, case), head_of(head_tensors(fp32, case))
    hidden = fp32.randn(case.rows, WIDTH)
    with fp32.active():
        capped, plain = (
            linear_token_losses(hidden, head, labels, transform=transform).nll
            for transform in (LogitTransform(softcap=1e5), LogitTransform())
        )
    assert float((capped - plain).norm()) <= 3e-7 * float(plain.norm())


def check_labels_that_are_none(setting: Setting) -> None:
    """Labels past either end of the vocabulary: the loss says so, and the rows beside it stay right."""
    logits, found = setting.randn(3, 521), {}
    for label in (9, 521, -1):
        grads, labels = logits.clone(), torch.tensor([5, label, 7], device=setting.device)
        with setting.active():
            nll = module._token_losses(grads, labels, PLAIN_LOGITS, IGNORE_INDEX, (), write_grad=True).nll
        found[label] = nll[::2], grads[::2]
        if bool(nll[1].isnan()) != (label != 9):
            raise OverLimit(f"loss {nll[1]} of label {label}")
    for label in (521, -1):
        if not all(map(torch.equal, found[label], found[9])):
            raise OverLimit(f"label {label} changes other rows")


def test_labels_that_are_none(setting):
    if setting.implementation == "reference":
        pytest.skip("torch refuses such an index")
    check_labels_that_are_none(setting)


@pytest.mark.parametrize(
    "case",
    [Case(), Case(vocab=4099), Case(transform=LogitTransform(1.7, 30.0), is_skipping=False)],
    ids=["plain", "past_a_block", "softcap"],
)
def test_statistics(setting, case):
    check_statistics(setting, case)


@pytest.mark.parametrize("pair", [(3, 4), (3, 4500), (0, 8100)], ids=str)
def test_first_of_equal_maxima(setting, pair):
    """argmax takes the first of equal logits: a label at the second one is not top-1."""
    weight = setting.randn(8192, WIDTH, scale=0.01)
    hidden = setting.randn(2, WIDTH)
    weight[list(pair)] = hidden[0]
    labels = torch.tensor([pair[0], pair[1]], device=setting.device)
    with setting.active():
        hits = linear_token_losses(
            hidden[:1].expand(2, -1), head_of({"weight": weight}), labels, statistics=("is_top1",)
        ).is_top1
    assert hits is not None and hits.tolist() == [True, False]


def test_only_nll_is_differentiable(fp32):
    case = Case()
    hidden = fp32.randn(case.rows, WIDTH).requires_grad_()
    with fp32.active():
        losses = linear_token_losses(
            hidden, head_of(head_tensors(fp32, case)), labels_of(fp32, case), statistics=("entropy",)
        )
    assert losses.nll.requires_grad and losses.is_top1 is None
    assert losses.entropy is not None and not losses.entropy.requires_grad


def test_unknown_statistic(fp32):
    case = Case()
    with fp32.active(), pytest.raises(ValueError, match="did you mean 'entropy'"):
        linear_token_losses(
            fp32.randn(case.rows, WIDTH), head_of(head_tensors(fp32, case)), labels_of(fp32, case),
            statistics=("entropi",),
        )  # fmt: skip


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias", "lora_a", "lora_b"])
@pytest.mark.parametrize("per_row", [False, True], ids=["mean", "rows"])
def test_only_requested_gradients(fp32, wanted, per_row):
    case = Case(rank=3, has_bias=True)
    labels = labels_of(fp32, case)
    tensors = {"hidden": fp32.randn(case.rows, WIDTH), **head_tensors(fp32, case)}
    tensors[wanted].requires_grad_()
    with fp32.active():
        if per_row:
            loss = linear_token_losses(tensors["hidden"], head_of(tensors), labels).nll.sum()
        else:
            loss = linear_cross_entropy(tensors["hidden"], head_of(tensors), labels)
        loss.backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


def test_no_rows(setting):
    tensors = head_tensors(setting, Case())
    hidden = setting.randn(0, WIDTH).requires_grad_()
    with setting.active():
        loss = linear_cross_entropy(hidden, head_of(tensors), setting.integers(0, 2, 0))
        loss.backward()
    assert loss.item() == 0.0 and hidden.grad is not None


def test_broken_hidden_state_is_seen(fp32):
    """A NaN in one row reaches that row's loss and no other."""
    case = Case(ignored=0.0)
    hidden = fp32.randn(case.rows, WIDTH)
    hidden[5, 3] = float("nan")
    with fp32.active():
        nll = linear_token_losses(hidden, head_of(head_tensors(fp32, case)), labels_of(fp32, case)).nll
    assert nll.isnan().nonzero().flatten().tolist() == [5]


def test_large_logits(fp32):
    """Logits of 1e5: one probability is 1, nothing overflows."""
    hidden = torch.eye(4, WIDTH, device=fp32.device) * 1e5
    weight = torch.eye(9, WIDTH, device=fp32.device)
    labels = torch.tensor([0, 1, 5, 3], device=fp32.device)
    with fp32.active():
        nll = linear_token_losses(hidden, head_of({"weight": weight}), labels).nll
    assert nll.tolist() == [0.0, 0.0, 1e5, 0.0]


def test_dropout_on_the_head_is_refused(fp32):
    head = ProjectionGroup(
        [Projection(fp32.randn(9, 8), None, fp32.randn(2, 8), fp32.randn(9, 2), 1.0, dropout=0.1)]
    )  # fmt: skip
    with pytest.raises(ValueError, match="dropout"):
        linear_cross_entropy(fp32.randn(3, 8), head, fp32.integers(0, 9, 3))


def test_label_count(device):
    labels = torch.tensor([3, IGNORE_INDEX, 5, IGNORE_INDEX, 0], device=device)
    assert LabelCount(labels).get() == 3
    assert LabelCount(labels, ignore_index=0).get() == 4


@pytest.mark.parametrize("per_row", [False, True], ids=["mean", "rows"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.5, 3.0)], ids=["plain", "scale_and_softcap"])
def test_gradcheck(transform, per_row, chunks_of_16):
    """Every gradient, in float64, over two chunks and a few ignored rows."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (19, 3), "weight": (5, 3), "bias": (5,), "lora_a": (2, 3), "lora_b": (5, 2)}
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes.values()]
    labels = torch.randint(0, 5, (19,), generator=generator)
    labels[[2, 17]] = IGNORE_INDEX

    def op(*values: torch.Tensor) -> torch.Tensor:
        tensors = dict(zip(shapes, values, strict=True))
        if per_row:
            return linear_token_losses(values[0], head_of(tensors), labels, transform=transform, valid_rows=17).nll
        return linear_cross_entropy(values[0], head_of(tensors), labels, transform=transform, valid_rows=17)

    assert torch.autograd.gradcheck(op, leaves)
