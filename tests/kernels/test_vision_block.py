"""A whole block of a vision tower with its hand-written backward."""

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.documents import Documents
from fastllm.kernels.layer_definition import Norm
from fastllm.kernels.lora import Projection, ProjectionGroup, dropout_masks
from fastllm.kernels.vision_block import BlockCall, LayerNorm, VisionBlock, vision_block, vision_block_reference

from . import eager
from .conftest import SETTINGS
from .layers import PARTS
from .parity import Biased, OverLimit, Setting, Tensors, check_op, wide
from .quantized import dequantized, quantize
from .test_decoder_layer import KEY_BIAS, LIMIT, check_whole_gradient
from .test_rope import angles

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("narrow_extension")]

EPS = 1e-6
SCALING = 0.5


@dataclass(frozen=True)
class Spec:
    """A block and its batch. `weights` is "dense", "trained" or "nf4"; `segments` are the lengths of the images that
    lie end to end, or None for a batch of two whole rows; where those are padded, their padding does not see itself."""

    segments: tuple[int, ...] | None = (5, 1, 8)
    width: int = 64
    heads: int = 4
    head_dim: int = 16
    mlp_width: int = 96
    norm: str = "layer_norm"
    activation: str = "quick_gelu"
    is_gated: bool = False
    is_merged: bool = True
    is_rotated: bool = True
    is_padded: bool = False
    has_bias: bool = True
    weights: str = "dense"
    has_lora: bool = True
    trains_norms: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    autocast: bool = False
    recompute: bool = False

    def shape(self) -> tuple[int, ...]:
        return (2, 7, self.width) if self.segments is None else (sum(self.segments), self.width)

    def groups(self) -> dict[str, tuple[str, ...]]:
        return {
            "qkv": ("qkv",) if self.is_merged else ("q", "k", "v"), "output": ("o",),
            "up": ("gate", "up") if self.is_gated else ("up",), "down": ("down",),
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each projection."""
        inner = self.heads * self.head_dim
        sizes = {
            "qkv": (3 * inner, self.width), **dict.fromkeys("qkv", (inner, self.width)), "o": (self.width, inner),
            **dict.fromkeys(("gate", "up"), (self.mlp_width, self.width)), "down": (self.width, self.mlp_width),
        }  # fmt: skip
        return {name: sizes[name] for names in self.groups().values() for name in names}


@pytest.fixture(params=[s for s in SETTINGS if torch.cuda.is_available() or s != "triton-fp16"])
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Interpreted kernels are tested in fp32: the block's own work is the same in every dtype."""
    return Setting(*SETTINGS[request.param], device)


def parameters_of(setting: Setting, spec: Spec) -> dict[str, torch.Tensor]:
    dtype = torch.float32 if spec.autocast else None
    tensors = {}
    for name in ("norm1", "norm2"):
        tensors[f"{name}_weight"] = setting.randn(spec.width, scale=0.2, dtype=dtype) + 1
        if spec.norm == "layer_norm":
            tensors[f"{name}_bias"] = setting.randn(spec.width, scale=0.2, dtype=dtype)
    for i, (name, (rows, columns)) in enumerate(spec.shapes().items()):
        tensors[f"{name}_weight"] = setting.randn(rows, columns, scale=columns**-0.5, dtype=dtype)
        if spec.has_bias:
            tensors[f"{name}_bias"] = setting.randn(rows, scale=0.3, dtype=dtype)
        if spec.has_lora:
            rank = 5 + i % 3
            tensors[f"{name}_lora_a"] = setting.randn(rank, columns, scale=columns**-0.5, dtype=dtype)
            tensors[f"{name}_lora_b"] = setting.randn(rows, rank, scale=0.3 * rank**-0.5, dtype=dtype)
    return tensors


def group_of(spec: Spec, tensors: Mapping, names: tuple[str, ...]) -> ProjectionGroup:
    return ProjectionGroup([
        Projection(*(tensors.get(f"{name}_{part}") for part in PARTS), scaling=SCALING, dropout=spec.dropout)
        for name in names
    ])  # fmt: skip


def block_of(spec: Spec, tensors: Mapping) -> VisionBlock:
    def norm(name: str) -> LayerNorm | Norm:
        if spec.norm == "layer_norm":
            return LayerNorm(tensors[f"{name}_weight"], tensors[f"{name}_bias"], EPS)
        return Norm(tensors[f"{name}_weight"], EPS)

    groups = {group: group_of(spec, tensors, names) for group, names in spec.groups().items()}
    return VisionBlock(
        norm1=norm("norm1"), norm2=norm("norm2"), **groups, activation=spec.activation, head_dim=spec.head_dim
    )


def call_of(setting: Setting, spec: Spec) -> BlockCall:
    documents = None
    if spec.segments is not None and len(spec.segments) > 1:
        offsets = torch.tensor([0, *spec.segments]).cumsum(0).to(setting.device)
        documents = Documents.from_cu_seqlens(offsets)
    mask = None
    if spec.is_padded:
        positions, lengths = torch.arange(spec.shape()[-2]), torch.tensor([[5], [3]])
        is_padding = (positions >= lengths).to(setting.device)
        mask = ~(is_padding[:, None, :, None] & is_padding[:, None, None, :])
    case = AttentionCase(spec.head_dim**-0.5, mask, spec.attention_dropout, documents=documents, causal=False)
    cos, sin = angles(setting, spec.shape()[-2], spec.head_dim) if spec.is_rotated else (None, None)
    return BlockCall(case, cos, sin, recompute=spec.recompute)


def masks_of(spec: Spec, tensors: Tensors) -> dict[str, torch.Tensor | None]:
    """The dropout masks of each projection, in the order in which the block draws them."""
    found = {}
    for names in spec.groups().values():
        group = group_of(spec, tensors, names)
        like = torch.empty(*spec.shape()[:-1], group.in_features, device=tensors["norm1_weight"].device).flatten(0, -2)
        found |= dict(zip(names, dropout_masks(group, like), strict=True))
    return found


def eager_block(x: torch.Tensor, spec: Spec, tensors: Tensors, masks: Mapping, call: BlockCall) -> torch.Tensor:
    """The block as transformers with PEFT runs it: attention segment by segment, rotation in fp32."""

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        if spec.norm == "layer_norm":
            return eager.layer_norm(value, tensors[f"{name}_weight"], tensors[f"{name}_bias"], EPS)
        return eager.rms_norm(value, tensors[f"{name}_weight"], EPS)

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        mask = None if masks[name] is None else masks[name].view(*value.shape)
        parts = (tensors.get(f"{name}_{part}") for part in PARTS)
        return eager.lora_linear(value, *parts, scaling=SCALING, mask=mask, dropout=spec.dropout)

    def joined(value: torch.Tensor, group: str) -> torch.Tensor:
        return torch.cat([linear(value, name) for name in spec.groups()[group]], dim=-1)

    rows = x if x.dim() == 3 else x[None]
    q, k, v = (
        part.unflatten(-1, (spec.heads, spec.head_dim)).transpose(1, 2)
        for part in joined(norm(rows, "norm1"), "qkv").chunk(3, dim=-1)
    )
    if call.cos is not None:
        turned = eager.rope(eager.at_least_fp32(q), eager.at_least_fp32(k), call.cos, call.sin)
        q, k = (t.to(v.dtype) for t in turned)
    lengths = [q.shape[2]] if spec.segments is None else list(spec.segments)
    attended = torch.cat([
        eager.attention(*part, scaling=call.attention.scaling, mask=call.attention.mask, causal=False)
        for part in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    ], dim=2)  # fmt: skip
    middle = rows + linear(attended.transpose(1, 2).flatten(2), "o")
    hidden = joined(norm(middle, "norm2"), "up")
    if spec.is_gated:
        hidden = eager.glu(*hidden.chunk(2, dim=-1), spec.activation)
    else:
        hidden = eager.activated(hidden, spec.activation)
    return (middle + linear(hidden, "down")).view(x.shape)


def is_frozen(spec: Spec, name: str) -> bool:
    if name.startswith("norm"):
        return spec.weights != "trained" and not spec.trains_norms
    return name.endswith("weight") and spec.weights != "trained"


def check_block(setting: Setting, spec: Spec) -> None:
    """y and every gradient; the gradient as a whole at most 1.1 times as far from the truth as eager's."""
    try:
        check_block_once(setting, spec)
    except Biased:
        check_block_once(setting, spec)  # of other numbers


def check_block_once(setting: Setting, spec: Spec) -> None:
    trained, frozen, dense = parameters_of(setting, spec), {}, {}
    for name in [name for name in trained if is_frozen(spec, name)]:
        frozen[name] = dense[name] = tensor = trained.pop(name)
        if spec.weights == "nf4" and tensor.dim() == 2:
            frozen[name], packed, state = quantize(tensor.float())
            dense[name] = dequantized(packed, state, setting.dtype)
    x = setting.randn(*spec.shape(), dtype=torch.float32 if spec.autocast else None)
    upstream = setting.randn(*x.shape, dtype=x.dtype)
    call = call_of(setting, spec)
    torch.manual_seed(3)
    masks = masks_of(spec, frozen | trained)

    def context(x: torch.Tensor) -> contextlib.AbstractContextManager:
        if spec.autocast and x.dtype != torch.float64:
            return torch.autocast(x.device.type, setting.dtype)
        return contextlib.nullcontext()

    def op(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        with context(x):
            return vision_block(x, block_of(spec, frozen | leaves), call)

    def plain(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        fixed = wide(dense) if x.dtype == torch.float64 else dense
        with context(x):
            return eager_block(x, spec, fixed | leaves, masks, call)

    inputs = {"x": x, **trained}
    # A third of the merged bias is that of the keys.
    limits = {
        name: KEY_BIAS if name in ("dk_bias", "dqkv_bias") else LIMIT for name in ("y", *(f"d{n}" for n in inputs))
    }
    ours, theirs, truth = check_op(
        op, plain, setting, inputs, limits, upstream=(upstream,), computed_in=setting.dtype
    )  # fmt: skip
    check_whole_gradient(setting, ours, theirs, truth)


SPECS = {
    "qwen2_vl": Spec(),
    "qwen2_5_vl": Spec(norm="rms_norm", activation="silu", is_gated=True),
    "qwen3_vl": Spec(activation="gelu_tanh", trains_norms=True),
    "siglip": Spec(segments=None, activation="gelu_tanh", is_merged=False, is_rotated=False),
    "clip_nf4": Spec(segments=None, is_merged=False, is_rotated=False, weights="nf4"),
    "pixtral": Spec(norm="rms_norm", activation="gelu", is_gated=True, is_merged=False, has_bias=False),
    "mllama": Spec(segments=None, activation="gelu", is_merged=False, is_rotated=False, is_padded=True),
    "one_image": Spec(segments=(9,)),
    "nf4": Spec(weights="nf4", trains_norms=True),
    "nf4_gated": Spec(weights="nf4", norm="rms_norm", activation="silu", is_gated=True, trains_norms=True),
    "full_finetuning": Spec(weights="trained", has_lora=False),
    "all_trained": Spec(weights="trained", norm="rms_norm", activation="gelu", is_gated=True),
    "dropout": Spec(dropout=0.2),
    "dropout_nf4": Spec(dropout=0.2, weights="nf4"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_matches_float64(setting, spec):
    check_block(setting, spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="part of the test above")
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_matches_float64_in_fp16_kernels(device, name):
    check_block(Setting("triton", torch.float16, device), SPECS[name])


@pytest.mark.parametrize("name", ["qwen2_vl", "siglip", "pixtral", "mllama", "all_trained", "dropout_nf4"])
def test_recomputed_matches_float64(setting, name):
    check_block(setting, dataclasses.replace(SPECS[name], recompute=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("weights", ["nf4", "dense"])
def test_autocast(setting, weights, recompute):
    """An fp32 residual stream and fp32 parameters, multiplied in 16 bit."""
    if setting.dtype != torch.float32:
        check_block(
            setting, Spec(autocast=True, mlp_width=128, weights=weights, trains_norms=True, recompute=recompute)
        )


def run_block(setting: Setting, spec: Spec) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """y, every gradient, and the state of the random generator afterwards, from one seed."""
    setting = dataclasses.replace(setting, generator=torch.Generator().manual_seed(1))
    leaves = parameters_of(setting, spec) | {"x": setting.randn(*spec.shape())}
    for leaf in leaves.values():
        leaf.requires_grad_()
    call, upstream = call_of(setting, spec), setting.randn(*spec.shape())
    torch.manual_seed(7)
    with setting.active():
        y = vision_block(leaves["x"], block_of(spec, leaves), call)
        y.backward(upstream)
    found = {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
    return found, torch.cuda.get_rng_state() if y.is_cuda else torch.get_rng_state()


def check_recomputation(setting: Setting, spec: Spec) -> None:
    """Kept and recomputed: the same bits, the same use of random numbers."""
    expected, state = run_block(setting, spec)
    found, state_now = run_block(setting, dataclasses.replace(spec, recompute=True))
    for name, tensor in expected.items():
        if not tensor.equal(found[name]):
            raise OverLimit(f"recomputed: {name} differs")
    if not state_now.equal(state):
        raise OverLimit("recomputation leaves another random state")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fast kernels add up dQ in any order")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_recomputation_gives_the_same_bits(setting, name, dropout):
    check_recomputation(setting, dataclasses.replace(SPECS[name], dropout=dropout, attention_dropout=dropout))


def test_an_image_does_not_see_another(fp32):
    """Not one bit of an image's output or gradient depends on what stands beside it."""
    spec = Spec()
    tensors, call = parameters_of(fp32, spec), call_of(fp32, spec)
    x, upstream = fp32.randn(*spec.shape()), fp32.randn(*spec.shape())
    found = []
    for scale in (1.0, -3.0):
        beside = torch.cat([x[:6], x[6:] * scale]).requires_grad_()
        with fp32.active():
            y = vision_block(beside, block_of(spec, tensors), call)
            (grad,) = torch.autograd.grad(y, beside, upstream)
        found.append((y[:6], grad[:6], y[6:]))
    (y, dy, other), (y_beside, dy_beside, other_beside) = found
    assert y.equal(y_beside) and dy.equal(dy_beside) and not other.equal(other_beside)


@pytest.mark.parametrize("upstream", ["of_a_sum", "transposed"])
def test_upstream_gradients_of_any_stride(fp32, upstream):
    spec = Spec()
    tensors, call = parameters_of(fp32, spec), call_of(fp32, spec)
    x = fp32.randn(*spec.shape()).requires_grad_()
    gradient = torch.ones((), device=x.device).expand(x.shape)
    if upstream == "transposed":
        gradient = fp32.randn(*reversed(x.shape)).t()
    with fp32.active():
        (given,) = torch.autograd.grad(vision_block(x, block_of(spec, tensors), call), x, gradient)
        (contiguous,) = torch.autograd.grad(vision_block(x, block_of(spec, tensors), call), x, gradient.contiguous())
    assert given.equal(contiguous)


@pytest.mark.parametrize("wanted", ["norm1_weight", "norm2_bias", "qkv_bias", "o_weight", "up_lora_b", "down_lora_a"])
def test_only_requested_gradients(fp32, wanted):
    """And the first block of a tower: x needs no gradient."""
    spec = Spec()
    tensors = parameters_of(fp32, spec)
    tensors[wanted].requires_grad_()
    with fp32.active():
        vision_block(fp32.randn(*spec.shape()), block_of(spec, tensors), call_of(fp32, spec)).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_trainable(fp32, recompute):
    spec = Spec(recompute=recompute)
    block, call, x = block_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec), fp32.randn(*spec.shape())
    with fp32.active():
        y = vision_block(x, block, call)
        assert not y.requires_grad and y.equal(vision_block(x.requires_grad_(), block, call))


def test_second_backward(fp32):
    """Refused where the activations are gone; a block that recomputes them can be run backward again."""
    spec = Spec(dropout=0.2)
    x, tensors = fp32.randn(*spec.shape()).requires_grad_(), parameters_of(fp32, spec)
    with fp32.active():
        y = vision_block(x, block_of(spec, tensors), call_of(fp32, spec)).sum()
        y.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph"):
            y.backward()
        call = call_of(fp32, dataclasses.replace(spec, recompute=True))
        y = vision_block(x, block_of(spec, tensors), call).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("recompute", [False, True])
def test_no_patches(fp32, recompute):
    spec = Spec(segments=(0,), recompute=recompute)
    x = fp32.randn(*spec.shape()).requires_grad_()
    tensors = {name: t.requires_grad_() for name, t in parameters_of(fp32, spec).items()}
    with fp32.active():
        y = vision_block(x, block_of(spec, tensors), call_of(fp32, spec))
        y.sum().backward()
    assert y.shape == x.shape and x.grad is not None
    assert all(t.grad is not None and not t.grad.any() for t in tensors.values())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "siglip", "pixtral", "mllama", "all_trained"])
def test_reference_is_the_definition(name, device):
    """The reference of the package against the block as Hugging Face writes it, in float64."""
    spec, setting = SPECS[name], Setting("reference", torch.float32, device)
    tensors, call = wide(parameters_of(setting, spec)), call_of(setting, spec)
    x = setting.randn(*spec.shape()).double()
    theirs = eager_block(x, spec, tensors, dict.fromkeys(spec.shapes()), call)
    torch.testing.assert_close(vision_block_reference(x, block_of(spec, tensors), call), theirs)


TINY = Spec(
    segments=(2, 1), width=5, heads=2, head_dim=4, mlp_width=6, weights="trained", recompute=True
)  # fmt: skip
TINY_SPECS = {
    "plain": TINY,
    "dropout": dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.2),
    "gated": dataclasses.replace(TINY, norm="rms_norm", is_gated=True, activation="silu"),
}


@pytest.mark.parametrize("spec", TINY_SPECS.values(), ids=TINY_SPECS.keys())
def test_gradcheck(spec):
    """Every gradient in float64, with recomputation: the random masks must be those of the forward."""
    setting = Setting("reference", torch.float32, torch.device("cpu"))
    tensors, call = wide(parameters_of(setting, spec)), call_of(setting, spec)
    x = setting.randn(*spec.shape()).double()

    def op(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return vision_block(x, block_of(spec, dict(zip(tensors, values, strict=True))), call)

    inputs = tuple(t.requires_grad_() for t in (x, *tensors.values()))
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
