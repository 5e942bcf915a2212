"""A whole decoder layer with its hand-written backward."""

import contextlib
import dataclasses
import functools

import pytest
import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.decoder_layer import decoder_layer
from fastllm.kernels.layer_definition import Keep, LayerCall, decoder_layer_reference

from ..determinism import deterministic
from . import eager
from .conftest import SETTINGS
from .layers import Spec, call_of, eager_layer, layer_of, masks_of, parameters_of, rows_to_host, to_host
from .parity import Biased, Limit, OverLimit, Setting, Tensors, check_op, wide
from .quantized import dequantized, quantize

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("narrow_extension")]

# Of y and of each gradient. The whole gradient has the tighter line of `check_layer`.
LIMIT = Limit(2.0, 3e-6, eager=2.0, rel_max=4.0)
WHOLE_GRADIENT = 1.1
# Softmax does not see what all keys share, so most of the gradient of a key bias cancels.
KEY_BIAS = Limit(2.0, 1e-5, eager=4.0, rel_max=8.0)


@pytest.fixture(params=[s for s in SETTINGS if torch.cuda.is_available() or s != "triton-fp16"])
def setting(request: pytest.FixtureRequest, device: torch.device) -> Setting:
    """Interpreted kernels are tested in fp32: the layer's own work is the same in every dtype."""
    return Setting(*SETTINGS[request.param], device)


def check_layer(setting: Setting, spec: Spec, **call_changes) -> None:
    """y and every gradient; the gradient as a whole at most 1.1 times as far from the truth as eager's."""
    try:
        check_layer_once(setting, spec, **call_changes)
    except Biased:
        check_layer_once(setting, spec, **call_changes)  # of other numbers


def check_layer_once(setting: Setting, spec: Spec, **call_changes) -> None:
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
    "two_tokens": Spec(batch=9, length=2),
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
    keeps = (Keep.ALL, Keep.INPUT, Keep.OFFLOADED_INPUT, Keep.OFFLOADED_ATTENTION)
    with deterministic():
        (expected, state), *others = (run_layer(setting, spec, keep, call) for keep in keeps)
    for keep, (found, state_now) in zip(keeps[1:], others, strict=True):
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


def check_away(setting: Setting, spec: Spec, rows_away: int = 0) -> list[int]:
    """An attention half that was in host memory, with rows of gate and up or without: the bits of a layer that kept
    all. Returns how many tensors went."""
    sent = []

    def offload(tensors):
        sent.append(len(tensors))
        return to_host(tensors)

    options = {"rows_away": rows_to_host(rows_away)} if rows_away else {}
    call = call_of(setting, spec, choose_backend=lambda *_: "triton", offload=offload, **options)
    with deterministic():
        expected, _ = run_layer(setting, spec, Keep.ALL, call)
        found, _ = run_layer(setting, spec, Keep.OFFLOADED_ATTENTION, call)
    for part, tensor in expected.items():
        if not tensor.equal(found[part]):
            raise OverLimit(f"{part} differs")
    return sent


# The residual stream, attention's output, q, k and v, two low-rank inputs, the input; what a norm read before and after
# attention. Where random numbers are drawn, the input alone.
@pytest.mark.parametrize(("name", "count"), [("nf4", 7), ("trained", 6), ("out_norms", 7), ("dropout", 1)])
def test_an_attention_half_comes_back_from_the_host_as_it_was(setting, name, count):
    dropout = KEEP_SPECS[name].dropout if count == 1 else 0.0
    assert check_away(setting, dataclasses.replace(KEEP_SPECS[name], dropout=dropout)) == [count]


@pytest.mark.parametrize("name", ["nf4", "trained", "out_norms"])
@pytest.mark.parametrize("is_all", [False, True])
def test_rows_that_come_back_from_the_host_are_not_computed_again(setting, name, is_all):
    spec = dataclasses.replace(KEEP_SPECS[name], dropout=0.0)
    check_away(setting, spec, rows_away=spec.batch * spec.length if is_all else 5)


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


@pytest.mark.parametrize(
    "keep", [Keep.ALL, Keep.OFFLOADED_INPUT, Keep.OFFLOADED_ATTENTION], ids=lambda keep: keep.name.lower()
)
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
