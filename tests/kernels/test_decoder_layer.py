"""A whole decoder layer with its hand-written backward."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.decoder_layer import decoder_layer
from fastllm.kernels.layer_definition import DecoderLayer, Keep, LayerCall, Norm, decoder_layer_reference
from fastllm.kernels.lora import Projection, ProjectionGroup, dropout_masks

from . import eager
from .conftest import SETTINGS
from .parity import Limit, OverLimit, Setting, Tensors, check_op, wide
from .quantized import dequantized, quantize
from .test_rope import angles

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("narrow_extension")]

EPS = 1e-5
GROUPS = {"qkv": ("q", "k", "v"), "output": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
MERGED_GROUPS = {"qkv": ("qkv",), "output": ("o",), "gate_up": ("gate_up",), "down": ("down",)}
PARTS = ("weight", "bias", "lora_a", "lora_b")
# Of y and of each gradient. The whole gradient has the tighter line of `check_layer`.
LIMIT = Limit(2.0, 3e-6, eager=2.0, rel_max=4.0)
WHOLE_GRADIENT = 1.1
# Softmax does not see what all keys share, so most of the gradient of a key bias cancels.
KEY_BIAS = Limit(2.0, 1e-5, eager=4.0, rel_max=8.0)


@dataclass(frozen=True)
class Spec:
    """A layer and its batch. `weights` is "dense", "trained" or "nf4"; LoRA ranks are 5, 6 and 7 inside a group."""

    batch: int = 2
    length: int = 7
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16
    mlp_width: int = 128
    weights: str = "nf4"
    has_lora: bool = True
    has_bias: bool = False
    has_head_norms: bool = False
    has_out_norms: bool = False
    is_merged: bool = False
    trains_norms: bool = False
    offset: float = 0.0
    activation: str = "silu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask: str = "causal"
    autocast: bool = False
    keep: Keep = Keep.ALL

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each projection."""
        inner, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        if self.is_merged:
            return {
                "qkv": (inner + 2 * keys, self.width), "o": (self.width, inner),
                "gate_up": (2 * self.mlp_width, self.width), "down": (self.width, self.mlp_width),
            }  # fmt: skip
        return {
            "q": (inner, self.width), "k": (keys, self.width), "v": (keys, self.width), "o": (self.width, inner),
            "gate": (self.mlp_width, self.width), "up": (self.mlp_width, self.width),
            "down": (self.width, self.mlp_width),
        }  # fmt: skip

    def groups(self) -> dict[str, tuple[str, ...]]:
        return MERGED_GROUPS if self.is_merged else GROUPS

    def norms(self) -> dict[str, int]:
        heads = {"query_norm": self.head_dim, "key_norm": self.head_dim} if self.has_head_norms else {}
        outputs = {"attention_out_norm": self.width, "mlp_out_norm": self.width} if self.has_out_norms else {}
        return {"input_norm": self.width, "post_norm": self.width, **heads, **outputs}


@pytest.fixture(params=[s for s in SETTINGS if torch.cuda.is_available() or s != "triton-fp16"])
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Interpreted kernels are tested in fp32: the layer's own work is the same in every dtype."""
    return Setting(*SETTINGS[request.param], device)


def parameters_of(setting: Setting, spec: Spec) -> dict[str, torch.Tensor]:
    dtype = torch.float32 if spec.autocast else None
    tensors = {}
    for name, size in spec.norms().items():
        tensors[name] = setting.randn(size, scale=0.2, dtype=dtype) + (1 - spec.offset)
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
    projections = [
        Projection(*(tensors.get(f"{name}_{part}") for part in PARTS), scaling=0.5, dropout=spec.dropout)
        for name in names
    ]
    return ProjectionGroup(projections)


def layer_of(spec: Spec, tensors: Mapping) -> DecoderLayer:
    norms = {name: Norm(tensors[name], EPS, spec.offset) for name in spec.norms()}
    groups = {group: group_of(spec, tensors, names) for group, names in spec.groups().items()}
    return DecoderLayer(**norms, **groups, activation=spec.activation, head_dim=spec.head_dim)


def to_host(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Offloads the way a memory planner does, without its streams."""
    on_host = x.detach().to("cpu", copy=True)
    return lambda: on_host.to(x.device, copy=True)


def call_of(setting: Setting, spec: Spec, **changes) -> LayerCall:
    cos, sin = angles(setting, spec.length, spec.rotary_dim)
    options = {
        "cos": cos.to(setting.dtype), "sin": sin.to(setting.dtype), "keep": spec.keep, "offload": to_host,
        "attention": AttentionCase(spec.head_dim**-0.5, mask_of(setting, spec), spec.attention_dropout),
    }  # fmt: skip
    return LayerCall(**{**options, **changes})


def mask_of(setting: Setting, spec: Spec) -> torch.Tensor | None:
    """Causal, and blind for the first two positions of the first row of the batch: padding on the left."""
    if spec.mask == "causal":
        return None
    seen = torch.ones(spec.batch, 1, spec.length, spec.length, dtype=torch.bool).tril()
    seen[0, :, 2:, :2] = False
    seen = seen.to(setting.device)
    return seen if spec.mask == "bool" else torch.zeros_like(seen, dtype=setting.dtype).masked_fill(~seen, -torch.inf)


def masks_of(spec: Spec, tensors: Tensors) -> dict[str, torch.Tensor | None]:
    """The dropout masks of each projection, in the order in which the layer draws them."""
    rows = spec.batch * spec.length
    found = {}
    for names in spec.groups().values():
        group = group_of(spec, tensors, names)
        like = torch.empty(rows, group.in_features, device=tensors["input_norm"].device)
        found |= dict(zip(names, dropout_masks(group, like), strict=True))
    return found


def eager_layer(
    x: torch.Tensor, spec: Spec, tensors: Tensors, masks: Mapping, call: LayerCall, *, autocast: bool = False
) -> torch.Tensor:
    """The layer as a Hugging Face model with PEFT runs it."""

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        return eager.rms_norm(value, tensors[name], EPS, offset=spec.offset)

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        mask = None if masks[name] is None else masks[name].view(*value.shape)
        parts = (tensors.get(f"{name}_{part}") for part in PARTS)
        return eager.lora_linear(value, *parts, scaling=0.5, mask=mask, dropout=spec.dropout)

    def joined(value: torch.Tensor, group: str) -> torch.Tensor:
        return torch.cat([linear(value, name) for name in spec.groups()[group]], dim=-1)

    heads = joined(norm(x, "input_norm"), "qkv").unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
    q, k, v = heads.split([spec.heads, spec.key_heads, spec.key_heads], dim=1)
    if spec.has_head_norms:
        q, k = norm(q, "query_norm"), norm(k, "key_norm")
    q, k = eager.rope(q, k, call.cos, call.sin)
    attend = call.attention.function or functools.partial(
        eager.attention, scaling=call.attention.scaling, mask=call.attention.mask
    )
    out = linear(attend(q, k, v).transpose(1, 2).flatten(2), "o")
    middle = x + (norm(out, "attention_out_norm") if spec.has_out_norms else out)
    gate, up = joined(norm(middle, "post_norm"), "gate_up").chunk(2, dim=-1)
    out = linear(eager.glu(gate, up, spec.activation), "down")
    return middle + (norm(out, "mlp_out_norm") if spec.has_out_norms else out)


def check_layer(setting: Setting, spec: Spec, **call_changes) -> None:
    """y and every gradient; the gradient as a whole at most 1.1 times as far from the truth as eager's."""
    trained, frozen, dense = parameters_of(setting, spec), {}, {}
    for name in [*spec.norms(), *(f"{p}_weight" for p in spec.shapes())]:
        is_norm = name in spec.norms()
        if spec.weights == "trained" or (is_norm and spec.trains_norms):
            continue
        frozen[name] = dense[name] = tensor = trained.pop(name)
        if spec.weights == "nf4" and not is_norm:
            frozen[name], packed, state = quantize(tensor.float())
            dense[name] = dequantized(packed, state, setting.dtype)
    x = setting.randn(spec.batch, spec.length, spec.width, dtype=torch.float32 if spec.autocast else None)
    upstream = setting.randn(*x.shape, dtype=x.dtype)
    call = call_of(setting, spec, **call_changes)
    torch.manual_seed(3)
    masks = masks_of(spec, frozen | trained)

    def context(x: torch.Tensor) -> contextlib.AbstractContextManager:
        if spec.autocast and x.dtype != torch.float64:
            return torch.autocast(x.device.type, setting.dtype)
        return contextlib.nullcontext()

    def op(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        with context(x):
            return decoder_layer(x, layer_of(spec, frozen | leaves), call)

    def plain(x: torch.Tensor, **leaves: torch.Tensor) -> torch.Tensor:
        fixed = wide(dense) if x.dtype == torch.float64 else dense
        with context(x):
            return eager_layer(x, spec, fixed | leaves, masks, call)

    inputs = {"x": x, **trained}
    limits = {name: KEY_BIAS if name == "dk_bias" else LIMIT for name in ("y", *(f"d{name}" for name in inputs))}
    ours, theirs, truth = check_op(
        op, plain, setting, inputs, limits, upstream=(upstream,), computed_in=setting.dtype
    )  # fmt: skip
    check_whole_gradient(setting, ours, theirs, truth)


def check_whole_gradient(setting: Setting, ours: Tensors, theirs: Tensors, truth: Tensors) -> None:
    def error(found: Tensors) -> float:
        names = [name for name in truth if name.startswith("d")]
        difference = sum((found[name].double() - truth[name]).square().sum() for name in names)
        return (difference / sum(truth[name].square().sum() for name in names)).sqrt().item()

    most = max(3e-6 if setting.dtype == torch.float32 else 0.0, WHOLE_GRADIENT * error(theirs))
    if not error(ours) <= most:
        raise OverLimit(f"whole gradient: {error(ours):.3e} > {most:.3e} (eager {error(theirs):.3e})")


SPECS = {
    "llama_nf4": Spec(),
    "llama_dense": Spec(weights="dense"),
    "full_finetuning": Spec(weights="trained", has_lora=False),
    "all_trained": Spec(weights="trained", has_bias=True, has_head_norms=True),
    "qwen2": Spec(weights="dense", has_bias=True),
    "qwen3": Spec(has_head_norms=True, trains_norms=True),
    "gemma": Spec(offset=1.0, activation="gelu_tanh", trains_norms=True),
    "gemma2": Spec(offset=1.0, activation="gelu_tanh", has_out_norms=True, weights="dense"),
    "gemma3": Spec(offset=1.0, activation="gelu_tanh", has_out_norms=True, has_head_norms=True, trains_norms=True),
    "partial_rotary": Spec(rotary_dim=8, head_dim=20, weights="dense"),
    "two_tokens": Spec(batch=1, length=2),
    "one_key_head": Spec(key_heads=1, length=17, batch=1),
    "bool_mask": Spec(mask="bool"),
    "additive_mask": Spec(mask="additive", weights="dense"),
    "merged": Spec(is_merged=True),
    "merged_trained": Spec(is_merged=True, weights="trained", has_bias=True, rotary_dim=8),
    "dropout": Spec(dropout=0.2),
    "dropout_dense": Spec(dropout=0.2, weights="dense", has_bias=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_matches_float64(setting, spec):
    check_layer(setting, spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="part of the test above")
@pytest.mark.parametrize("name", ["llama_nf4", "qwen2"])
def test_matches_float64_in_fp16_kernels(device, name):
    check_layer(Setting("triton", torch.float16, device), SPECS[name])


@pytest.mark.parametrize("name", ["llama_nf4", "all_trained", "dropout", "gemma3"])
def test_recomputed_matches_float64(setting, name):
    check_layer(setting, dataclasses.replace(SPECS[name], keep=Keep.INPUT))


@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name.lower())
@pytest.mark.parametrize("weights", ["nf4", "dense"])
@pytest.mark.parametrize("has_out_norms", [False, True], ids=["llama", "out_norms"])
def test_autocast(setting, has_out_norms, weights, keep):
    """An fp32 residual stream and fp32 parameters, multiplied in 16 bit."""
    if setting.dtype != torch.float32:
        spec = Spec(
            autocast=True, weights=weights, trains_norms=True, has_bias=True, keep=keep, has_out_norms=has_out_norms
        )
        check_layer(setting, spec)


def test_attention_function_of_the_caller(setting):
    """Whatever attention the model uses, here one with soft-capped scores."""

    def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) / 4 / 5) * 5
        return eager.at_least_fp32(scores).softmax(-1).to(q.dtype) @ v

    check_layer(setting, Spec(weights="dense"), attention=AttentionCase(0.25, function=capped))


@pytest.mark.parametrize("upstream", ["of_a_sum", "transposed"])
def test_upstream_gradients_of_any_stride(fp32, upstream):
    """The gradient of `y.sum()` has stride 0 everywhere; another op may hand over a transposed one."""
    spec = Spec(weights="dense")
    tensors, call = parameters_of(fp32, spec), call_of(fp32, spec)
    x = fp32.randn(spec.batch, spec.length, spec.width).requires_grad_()
    gradient = torch.ones((), device=x.device).expand(x.shape)
    if upstream == "transposed":
        gradient = fp32.randn(*x.shape[:1], *x.shape[:0:-1]).transpose(1, 2)
    with fp32.active():
        y = decoder_layer(x, layer_of(spec, tensors), call)
        (given,) = torch.autograd.grad(y, x, gradient)
        y = decoder_layer(x, layer_of(spec, tensors), call)
        (contiguous,) = torch.autograd.grad(y, x, gradient.contiguous())
    assert given.equal(contiguous)


@pytest.mark.parametrize("batch", [1, 2])
def test_input_of_any_stride(fp32, batch):
    spec = Spec(batch=batch, weights="dense")
    layer, call = layer_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec)
    x = fp32.randn(spec.batch, spec.width, spec.length).transpose(1, 2)
    with fp32.active():
        assert decoder_layer(x, layer, call).equal(decoder_layer(x.contiguous(), layer, call))


def run_layer(
    setting: Setting, spec: Spec, keep: Keep, call: LayerCall
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """y, every gradient, and the state of the random generator afterwards, from one seed."""
    setting = dataclasses.replace(setting, generator=torch.Generator().manual_seed(1))
    tensors = parameters_of(setting, spec)
    if spec.weights == "nf4":
        leaves = {name: t for name, t in tensors.items() if "weight" not in name}
        tensors |= {name: quantize(t.float())[0] for name, t in tensors.items() if name not in leaves}
    else:
        leaves = dict(tensors)
    leaves["x"] = setting.randn(spec.batch, spec.length, spec.width)
    for leaf in leaves.values():
        leaf.requires_grad_()
    torch.manual_seed(7)
    with setting.active():
        y = decoder_layer(leaves["x"], layer_of(spec, tensors), dataclasses.replace(call, keep=keep))
        y.backward(setting.randn(*y.shape))
    found = {"y": y.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}
    return found, torch.cuda.get_rng_state() if y.is_cuda else torch.get_rng_state()


def check_keep_modes(setting: Setting, spec: Spec) -> None:
    """Kept, recomputed and offloaded: the same bits, the same use of random numbers."""
    call = call_of(setting, spec)
    if setting.device.type == "cuda":  # the backward of the fast kernels adds up dQ in any order
        function = functools.partial(eager.attention, scaling=0.25)
        call = dataclasses.replace(call, attention=dataclasses.replace(call.attention, function=function))
    expected, state = run_layer(setting, spec, Keep.ALL, call)
    for keep in (Keep.INPUT, Keep.OFFLOADED_INPUT):
        found, state_now = run_layer(setting, spec, keep, call)
        for name, tensor in expected.items():
            if not tensor.equal(found[name]):
                raise OverLimit(f"{keep}: {name} differs from {Keep.ALL}")
        if not state_now.equal(state):
            raise OverLimit(f"{keep} leaves another random state")


KEEP_SPECS = {
    "nf4": Spec(has_head_norms=True),
    "trained": Spec(weights="trained", has_bias=True),
    "dropout": Spec(dropout=0.3, has_head_norms=True),
    "out_norms": Spec(dropout=0.3, has_out_norms=True, trains_norms=True, offset=1.0),
    "dropout_everywhere": Spec(dropout=0.3, attention_dropout=0.3, weights="dense", trains_norms=True),
}


@pytest.mark.parametrize("spec", KEEP_SPECS.values(), ids=KEEP_SPECS.keys())
def test_keep_modes_give_the_same_bits(setting, spec):
    check_keep_modes(setting, spec)


def test_frozen_input(fp32):
    """The first layer of a model: x needs no gradient, the adapters get theirs."""
    spec = Spec(weights="dense")
    tensors, call = parameters_of(fp32, spec), call_of(fp32, spec)
    x, wanted = fp32.randn(spec.batch, spec.length, spec.width), tensors["q_lora_a"].requires_grad_()
    with fp32.active():
        decoder_layer(x, layer_of(spec, tensors), call).sum().backward()
        frozen = wanted.grad
        wanted.grad = None
        decoder_layer(x.requires_grad_(), layer_of(spec, tensors), call).sum().backward()
    assert frozen is not None and frozen.equal(wanted.grad)
    assert [name for name, t in tensors.items() if t.grad is not None] == ["q_lora_a"]


@pytest.mark.parametrize(
    "wanted",
    [
        "input_norm", "key_norm", "post_norm", "attention_out_norm", "mlp_out_norm", "v_bias", "o_weight", "up_lora_b",
        "down_lora_a",
    ],
)  # fmt: skip
def test_only_requested_gradients(fp32, wanted):
    spec = Spec(weights="dense", has_bias=True, has_head_norms=True, has_out_norms=True)
    tensors = parameters_of(fp32, spec)
    tensors[wanted].requires_grad_()
    with fp32.active():
        x = fp32.randn(spec.batch, spec.length, spec.width)
        decoder_layer(x, layer_of(spec, tensors), call_of(fp32, spec)).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name.lower())
def test_nothing_trainable(fp32, keep):
    spec = Spec(weights="dense")
    layer, call = layer_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec, keep=keep)
    x = fp32.randn(spec.batch, spec.length, spec.width)
    with fp32.active():
        y = decoder_layer(x, layer, call)
        assert not y.requires_grad and y.equal(decoder_layer(x.requires_grad_(), layer, call))


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.OFFLOADED_INPUT], ids=lambda keep: keep.name.lower())
def test_second_backward_is_refused(fp32, keep):
    spec = Spec(weights="dense")
    x = fp32.randn(spec.batch, spec.length, spec.width).requires_grad_()
    with fp32.active():
        y = decoder_layer(x, layer_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec, keep=keep)).sum()
        y.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph"):
            y.backward()


def test_second_backward_of_a_recomputing_layer(fp32):
    """What keeps only its input can be run backward again."""
    spec = Spec(weights="dense", dropout=0.2)
    x = fp32.randn(spec.batch, spec.length, spec.width).requires_grad_()
    with fp32.active():
        y = decoder_layer(x, layer_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec, keep=Keep.INPUT)).sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


def test_offloading_needs_a_place(fp32):
    with pytest.raises(ValueError, match="offload"):
        call_of(fp32, Spec(), keep=Keep.OFFLOADED_INPUT, offload=None)


def test_changed_input_is_noticed(fp32):
    """Overwriting x between forward and backward raises, as for any op of PyTorch."""
    spec = Spec(weights="dense")
    start = fp32.randn(spec.batch, spec.length, spec.width).requires_grad_()
    x = start * 1
    with fp32.active():
        y = decoder_layer(x, layer_of(spec, parameters_of(fp32, spec)), call_of(fp32, spec))
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.INPUT], ids=lambda keep: keep.name.lower())
def test_empty_batch(fp32, keep):
    spec = Spec(batch=0, weights="dense")
    x = fp32.randn(0, spec.length, spec.width).requires_grad_()
    tensors = {name: t.requires_grad_() for name, t in parameters_of(fp32, spec).items()}
    with fp32.active():
        y = decoder_layer(x, layer_of(spec, tensors), call_of(fp32, spec, keep=keep))
        y.sum().backward()
    assert y.shape == x.shape and x.grad is not None
    assert all(t.grad is not None and not t.grad.any() for t in tensors.values())


@pytest.mark.parametrize("name", ["llama_dense", "all_trained", "gemma", "gemma3", "merged", "bool_mask"])
def test_reference_is_the_definition(name, device):
    """The reference of the package against the layer as Hugging Face writes it, in float64."""
    spec = dataclasses.replace(SPECS[name], weights="dense")
    setting = Setting("reference", torch.float32, device)
    tensors, call = wide(parameters_of(setting, spec)), call_of(setting, spec)
    x = setting.randn(spec.batch, spec.length, spec.width).double()
    ours = decoder_layer_reference(x, layer_of(spec, tensors), call.cos, call.sin, call.attention)
    theirs = eager_layer(x, spec, tensors, dict.fromkeys(spec.shapes()), call)
    torch.testing.assert_close(ours, theirs)


TINY = Spec(
    batch=1, length=3, width=5, heads=2, key_heads=1, head_dim=4, rotary_dim=2, mlp_width=6, weights="trained",
    has_bias=True, has_head_norms=True, keep=Keep.INPUT,
)  # fmt: skip
TINY_SPECS = {
    "plain": TINY,
    "dropout": dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.2),
    "gemma": dataclasses.replace(TINY, offset=1.0, activation="gelu"),
    "out_norms": dataclasses.replace(TINY, has_out_norms=True, dropout=0.3),
}


@pytest.mark.parametrize("spec", TINY_SPECS.values(), ids=TINY_SPECS.keys())
def test_gradcheck(spec):
    """Every gradient in float64, with recomputation: the random masks must be those of the forward."""
    setting = Setting("reference", torch.float32, torch.device("cpu"))
    tensors = wide(parameters_of(setting, spec))
    call = call_of(setting, spec)
    x = setting.randn(spec.batch, spec.length, spec.width).double()

    def op(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        return decoder_layer(x, layer_of(spec, dict(zip(tensors, values, strict=True))), call)

    inputs = tuple(t.requires_grad_() for t in (x, *tensors.values()))
    assert torch.autograd.gradcheck(op, inputs, fast_mode=True)
