"""Linear projections with LoRA, alone and in groups, over dense and 4-bit weights."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from fastllm.kernels import lora
from fastllm.kernels.lora import Projection, ProjectionGroup, dropout_masks, project_group, project_reference
from fastllm.kernels.nf4 import Nf4Weight

from . import eager
from .parity import Limit, Setting, check_op, wide
from .quantized import dequantized, quantize

# One extended product: x A^T rounds, then the sum.
JOINED = Limit(1.25, 2.5e-6, rel_max=2.0)
# Weights used where they lie: the low-rank term rounds as well. For matrices as small as these cuBLAS splits sums and
# rounds their parts too, eager's as ours.
SEPARATE = Limit(1.5, 2.5e-6, eager=1.1, rel_max=2.0)
# dX of a group over separate weights rounds after each projection, as eager does, which rounds after each LoRA too.
GROUP = Limit(1.5, 2.5e-6, eager=1.1, rel_max=2.0)
# Under autocast eager adds up all shares of dX in fp32, ours only those of the LoRA paths under dropout.
DROPOUT_GROUP = Limit(1.5, 2.5e-6, eager=1.25, rel_max=2.0)
# dA and dB round where eager's do.
ADAPTER = Limit(1.5, 2.5e-6, eager=1.05, rel_max=2.0)
ONE_ROUNDING = Limit(1.1, 2.5e-6)

ROWS, IN_FEATURES = 67, 128


@dataclass(frozen=True)
class Spec:
    """One projection of a group; rank 0 has no LoRA."""

    out_features: int
    rank: int = 0
    scaling: float = 2.0
    has_bias: bool = False
    dropout: float = 0.0


GROUPS = {
    "no_lora": [Spec(48)],
    "one": [Spec(48, 8)],
    "one_row": [Spec(1, 1)],
    "odd": [Spec(37, 5, has_bias=True)],
    "past_the_padding": [Spec(33, 65)],
    "gate_up": [Spec(70, 8), Spec(70, 8)],
    "qkv_bias": [Spec(64, 7, has_bias=True), Spec(32, 3, has_bias=True), Spec(32, 16, has_bias=True)],
    "one_bias": [Spec(24, 4), Spec(24, 4, has_bias=True)],
    "hole": [Spec(40, 4), Spec(24), Spec(24, 9)],
    "first_plain": [Spec(40), Spec(24, 6)],
    "four": [Spec(16, 2), Spec(8, 3), Spec(24, 4), Spec(8, 5)],
}
RANK_STABILIZED = [Spec(64, 7, scaling=16 / 7**0.5), Spec(32, 3, scaling=16 / 3**0.5)]
DROPOUT = [Spec(48, 6, dropout=0.25), Spec(24, 4, has_bias=True), Spec(24, 9, dropout=0.5)]
NAMES = ("weight", "bias", "lora_a", "lora_b")


def tensors_of(setting: Setting, specs: list[Spec], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """`weight0`, `bias0`, `lora_a0`, `lora_b0`, ...; the LoRA path is about two thirds as large as the base path."""
    tensors = {}
    for i, spec in enumerate(specs):
        tensors[f"weight{i}"] = setting.randn(spec.out_features, IN_FEATURES, scale=IN_FEATURES**-0.5, dtype=dtype)
        if spec.has_bias:
            tensors[f"bias{i}"] = setting.randn(spec.out_features, dtype=dtype)
        if spec.rank:
            size = (spec.rank**-0.5 / 3 / spec.scaling) ** 0.5 * IN_FEATURES**-0.25
            tensors[f"lora_a{i}"] = setting.randn(spec.rank, IN_FEATURES, scale=size, dtype=dtype)
            tensors[f"lora_b{i}"] = setting.randn(spec.out_features, spec.rank, scale=2 * size, dtype=dtype)
    return tensors


def group_of(specs: list[Spec], tensors: Mapping[str, torch.Tensor | Nf4Weight]) -> ProjectionGroup:
    return ProjectionGroup(
        [
            Projection(*(tensors.get(f"{name}{i}") for name in NAMES), spec.scaling, spec.dropout)
            for i, spec in enumerate(specs)
        ]
    )


def eager_group(
    x: torch.Tensor,
    specs: list[Spec],
    tensors: Mapping[str, torch.Tensor],
    masks: list[torch.Tensor | None],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Each projection by itself, in `dtype` (None leaves that to autocast)."""

    def cast(t: torch.Tensor | None) -> torch.Tensor | None:
        return t if t is None or dtype is None else t.to(dtype)

    outputs = [
        eager.lora_linear(
            cast(x), *(cast(tensors.get(f"{name}{i}")) for name in NAMES),
            scaling=spec.scaling, mask=masks[i], dropout=spec.dropout,
        )
        for i, spec in enumerate(specs)
    ]  # fmt: skip
    return torch.cat(outputs, dim=-1)


def limits_of(specs: list[Spec], weights: str, names: list[str]) -> dict[str, Limit]:
    has_dropout = any(spec.dropout for spec in specs)
    is_joined = weights == "nf4" and not has_dropout
    is_exact = all(spec.scaling == 2.0 for spec in specs)  # a power of two scales A without rounding
    output = JOINED if is_joined and is_exact else SEPARATE
    kinds = {
        "y": output,
        "dx": DROPOUT_GROUP if has_dropout else output if is_joined or len(specs) == 1 else GROUP,
        "dlora": ADAPTER, "dweight": ONE_ROUNDING, "dbias": ONE_ROUNDING,
    }  # fmt: skip
    return {name: next(limit for kind, limit in kinds.items() if name.startswith(kind)) for name in names}


def check_group(
    setting: Setting,
    specs: list[Spec],
    *,
    weights: str = "dense",
    master: torch.dtype | None = None,
    autocast: bool = False,
    x: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
) -> None:
    """The joined output and every gradient of a group, with the dropout masks that the op draws.

    `weights` is "dense", "trained" or "nf4"; `master` the dtype of the parameters, where it is not the computed one;
    with `autocast` x is fp32 and the compute dtype comes from autocast.
    """
    trained = tensors_of(setting, specs, master)
    frozen, dense = {}, {}
    for i in range(len(specs) if weights != "trained" else 0):
        weight = frozen[f"weight{i}"] = dense[f"weight{i}"] = trained.pop(f"weight{i}")
        if weights == "nf4":
            frozen[f"weight{i}"], packed, state = quantize(weight.float())
            dense[f"weight{i}"] = dequantized(packed, state, setting.dtype)
    if x is None:
        x = setting.randn(ROWS, IN_FEATURES, dtype=torch.float32 if autocast else None)
    if upstream is None:
        upstream = setting.randn(*x.shape[:-1], sum(spec.out_features for spec in specs))

    def context(x: torch.Tensor) -> contextlib.AbstractContextManager:
        if autocast and x.dtype != torch.float64:
            return torch.autocast(x.device.type, setting.dtype)
        return contextlib.nullcontext()

    def op(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        with context(x):
            return project_group(x, group_of(specs, frozen | leaves))

    torch.manual_seed(3)
    masks = dropout_masks(group_of(specs, frozen | trained), x)

    def plain(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        is_truth = x.dtype == torch.float64
        dtype = x.dtype if is_truth else None if autocast else setting.dtype
        with context(x):
            return eager_group(x, specs, (wide(dense) if is_truth else dense) | leaves, masks, dtype)

    inputs = {"x": x, **trained}
    limits = limits_of(specs, weights, ["y", *(f"d{name}" for name in inputs)])
    check_op(op, plain, setting, inputs, limits, upstream=(upstream,), computed_in=setting.dtype)


@pytest.mark.parametrize("weights", ["dense", "trained", "nf4"])
@pytest.mark.parametrize("specs", GROUPS.values(), ids=GROUPS.keys())
def test_matches_float64(setting, specs, weights):
    check_group(setting, specs, weights=weights)


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("weights", ["dense", "trained"])
@pytest.mark.parametrize("name", ["one", "qkv_bias", "hole", "dropout"])
def test_dense_weights_as_gpus_multiply_them(device, monkeypatch, name, weights, is_joined):
    """In 16 bits: beside A and B for many rows, and added in fp32 for few."""
    monkeypatch.setattr(lora, "_adds_in_16_bits", lambda *_: True)
    monkeypatch.setattr(lora, "_pays_to_join", lambda group, *_: is_joined and group.extension > 0)
    specs = DROPOUT if name == "dropout" else GROUPS[name]
    for dtype in (torch.bfloat16, torch.float16):
        implementation = "triton" if device.type == "cuda" else "reference"
        check_group(Setting(implementation, dtype, device), specs, weights=weights)


@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_rank_stabilized_scaling(setting, weights):
    """alpha / sqrt(r) is no power of two: scaling A rounds."""
    check_group(setting, RANK_STABILIZED, weights=weights)


@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_dropout(setting, weights):
    """Each projection's own mask, the same one in forward and backward."""
    check_group(setting, DROPOUT, weights=weights)


@pytest.mark.parametrize("weights", ["dense", "trained", "nf4"])
def test_fp32_parameters(setting, weights):
    """Adapters, biases and weights kept in fp32 while x is 16-bit: gradients come back in fp32."""
    if weights == "nf4" or setting.dtype == torch.float32:
        check_group(setting, GROUPS["qkv_bias"], weights=weights, master=torch.float32)
    else:  # fp32 weights, dense or trained, are multiplied in 16 bit under autocast only
        check_group(setting, GROUPS["qkv_bias"], weights=weights, master=torch.float32, autocast=True)


@pytest.mark.parametrize("specs", [GROUPS["one"], GROUPS["hole"], DROPOUT], ids=["one", "hole", "dropout"])
def test_autocast(setting, specs):
    if setting.dtype != torch.float32:
        check_group(setting, specs, weights="nf4", master=torch.float32, autocast=True)
        check_group(setting, specs, weights="dense", autocast=True)


def test_compute_dtype_of_a_quantized_layer(setting):
    """An fp32 input is multiplied in the dtype that a 4-bit layer names, and the gradient returns in fp32."""
    plain, _, _ = quantize(setting.randn(48, 64, dtype=torch.float32))
    weight = Nf4Weight(**{f: getattr(plain, f) for f in Nf4Weight.__slots__} | {"compute_dtype": setting.dtype})
    x = setting.randn(3, 64, dtype=torch.float32).requires_grad_()
    with setting.active():
        y = project_group(x, ProjectionGroup([Projection(weight)]))
        y.sum().backward()
    assert y.dtype == setting.dtype and x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("weights", ["dense", "nf4"])
@pytest.mark.parametrize("layout", ["three_dimensions", "columns", "transposed", "upstream_of_a_sum"])
def test_layouts(setting, layout, weights):
    x, upstream = None, None
    if layout == "three_dimensions":
        x = setting.randn(3, 5, IN_FEATURES)
    elif layout == "columns":
        x = setting.randn(ROWS, 2 * IN_FEATURES)[:, 3 : 3 + IN_FEATURES]
    elif layout == "transposed":
        x, upstream = setting.randn(IN_FEATURES, ROWS).t(), setting.randn(128, ROWS).t()
    else:
        upstream = torch.ones((), dtype=setting.dtype, device=setting.device).expand(ROWS, 128)
    check_group(setting, GROUPS["qkv_bias"], weights=weights, x=x, upstream=upstream)


def test_four_bit_beside_dense(setting):
    """A group may mix 4-bit and dense weights (skipped modules)."""
    specs = GROUPS["gate_up"]
    tensors = tensors_of(setting, specs)
    quantized, packed, state = quantize(tensors["weight0"].float())
    x = setting.randn(ROWS, IN_FEATURES)
    with setting.active():
        mixed = project_group(x, group_of(specs, tensors | {"weight0": quantized}))
        dense = project_group(x, group_of(specs, tensors | {"weight0": dequantized(packed, state, setting.dtype)}))
    assert (mixed - dense).abs().max() <= 4 * torch.finfo(setting.dtype).eps * dense.abs().max()


@pytest.mark.parametrize("weights", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(0, IN_FEATURES), (2, 0, IN_FEATURES)], ids=str)
def test_no_rows(setting, shape, weights):
    specs = GROUPS["qkv_bias"]
    tensors = {name: t.requires_grad_() for name, t in tensors_of(setting, specs).items()}
    if weights == "nf4":
        tensors |= {f"weight{i}": quantize(tensors[f"weight{i}"].detach().float())[0] for i in range(len(specs))}
    x = setting.randn(*shape).requires_grad_()
    with setting.active():
        y = project_group(x, group_of(specs, tensors))
        y.sum().backward()
    assert y.shape == (*shape[:-1], 128) and x.grad is not None and x.grad.shape == shape
    assert all(not t.grad.any() for t in tensors.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("wanted", ["x", "bias0", "lora_a0", "lora_b1", "weight1"])
def test_only_requested_gradients(fp32, wanted):
    specs = [Spec(24, 4, has_bias=True), Spec(16, 3)]
    tensors = {"x": fp32.randn(5, IN_FEATURES), **tensors_of(fp32, specs)}
    tensors[wanted].requires_grad_()
    with fp32.active():
        project_group(tensors["x"], group_of(specs, tensors)).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


def test_masks_are_independent_and_fair(fp32):
    specs = [Spec(4, 2, dropout=0.1), Spec(4), Spec(4, 2, dropout=0.1)]
    group = group_of(specs, tensors_of(fp32, specs))
    torch.manual_seed(0)
    first, absent, last = dropout_masks(group, fp32.randn(200, IN_FEATURES))
    assert first is not None and absent is None and last is not None
    kept = torch.stack((first, last)).double()
    # 25,600 draws: four standard deviations are 0.0075
    assert (kept.mean((1, 2)) - 0.9).abs().max() < 0.0075
    assert (kept.prod(0).mean() - 0.81).abs() < 0.01, "the projections drop the same inputs"


def test_random_stream(fp32):
    """The forward takes exactly the random numbers of its masks, the backward none."""
    tensors = tensors_of(fp32, DROPOUT)
    tensors["lora_a0"].requires_grad_()
    x, group = fp32.randn(ROWS, IN_FEATURES), group_of(DROPOUT, tensors)

    def state() -> torch.Tensor:
        return torch.cuda.get_rng_state() if fp32.device.type == "cuda" else torch.get_rng_state()

    torch.manual_seed(5)
    dropout_masks(group, x)
    after_masks = state()
    torch.manual_seed(5)
    with fp32.active():
        y = project_group(x, group)
        assert state().equal(after_masks)
        y.sum().backward()
    assert state().equal(after_masks)


def test_one_input_width():
    with pytest.raises(ValueError, match="one input"):
        ProjectionGroup([Projection(torch.zeros(4, 8)), Projection(torch.zeros(4, 9))])


def test_reference_is_the_definition(fp32):
    specs = GROUPS["odd"]
    tensors, x = tensors_of(fp32, specs), fp32.randn(5, IN_FEATURES)
    (projection,) = group_of(specs, tensors).projections
    torch.testing.assert_close(project_reference(x, projection), eager_group(x, specs, tensors, [None], None))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    """Every gradient of a group of two, one with a bias, in float64."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    specs = [Spec(4, 2, 0.7, True, dropout), Spec(3, 3, 1.3)]
    names = ["weight0", "bias0", "lora_a0", "lora_b0", "weight1", "lora_a1", "lora_b1"]
    leaves = [leaf(*shape) for shape in ((4, 6), (4,), (2, 6), (4, 2), (3, 6), (3, 6), (3, 3))]

    def op(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return project_group(x, group_of(specs, dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(op, (leaf(5, 6), *leaves))
