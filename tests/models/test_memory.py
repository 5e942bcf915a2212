"""The planner keeps what fits, never plans past what is free, and never changes a result."""

import pytest
import torch

from fastllm._device import free_bytes
from fastllm._errors import ArgumentError
from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.decoder_layer import decoder_layer
from fastllm.kernels.layer_definition import Keep, LayerCall
from fastllm.models import memory
from fastllm.models.fp8_compute import use_fp8
from fastllm.models.fused_parts import fused_layer
from fastllm.models.host_offload import HostOffload
from fastllm.models.memory import GIB, ActivationPlanner, LayerBytes, checkpointing_setting, training_bytes
from fastllm.models.model_methods import PLANNER

from ..determinism import deterministic
from .families import FAMILIES, batch, build, fast_copy, step, with_lora

pytestmark = pytest.mark.usefixtures("full_host")


@pytest.fixture
def layer():
    return fused_layer(with_lora(fast_copy(build(FAMILIES["llama"]))).get_base_model().model.layers[0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("unsloth", "fastllm"),
        ("fastllm", "fastllm"),
        ("offload", "offload"),
        (True, True),
        ("True", True),
        (False, False),
    ],
)
def test_settings(value, expected):
    assert checkpointing_setting(value) is expected or checkpointing_setting(value) == expected


@pytest.mark.parametrize("value", ["smart", None, 3])
def test_unknown_settings_raise(value):
    with pytest.raises(ArgumentError, match="offload"):
        checkpointing_setting(value)


def plan(monkeypatch, layer, free, *, tokens=4096, layers=32, device="cuda", reserved=0):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    planner = ActivationPlanner(layers, "fastllm")
    planner.reserved_bytes = reserved
    return planner._make_plan(layer, tokens, torch.device(device), torch.bfloat16)


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 70 + 2), (0.5, 40 - 10 + 2), (0.1, 2)])
def test_the_limit_of_a_process_counts(monkeypatch, fraction, expected):
    """80 GiB in all, 70 free; this process holds 10, of which 2 are unused."""
    known = {
        "mem_get_info": (70 * GIB, 80 * GIB), "memory_reserved": 10 * GIB, "memory_allocated": 8 * GIB,
        "get_per_process_memory_fraction": fraction,
    }  # fmt: skip
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == expected * GIB


def test_what_training_takes_besides_activations():
    """Of each trained parameter a gradient and two fp32 states, of a trained head an fp32 sum too."""
    model = build(FAMILIES["llama"]).to(torch.bfloat16)
    count, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
    assert training_bytes(model) == 10 * count + 4 * head
    model.lm_head.requires_grad_(False)
    assert training_bytes(model) == 10 * (count - head)
    assert training_bytes(model.model) == 10 * (count - head)  # no head


@pytest.mark.parametrize("free", [0, GIB // 4, GIB, 2 * GIB, 8 * GIB, 64 * GIB])
def test_a_plan_fits_the_free_memory(monkeypatch, layer, free):
    sizes = LayerBytes.of(layer, torch.bfloat16)
    tokens = 65536
    made = plan(monkeypatch, layer, free, tokens=tokens)
    held = tokens * sum(
        {Keep.ALL: sizes.stash + sizes.layer_input, Keep.INPUT: sizes.layer_input, Keep.OFFLOADED_INPUT: 0}[k]
        for k in made
    )
    held -= tokens * sizes.stash  # of the last layer: its backward takes as much
    floor = tokens * sizes.layer_input  # the last layer's input is always on the device
    assert len(made) == 32 and made[-1] is Keep.ALL
    assert held + sizes.transient(tokens) <= max(free, floor + sizes.transient(tokens))
    order = [Keep.OFFLOADED_INPUT, Keep.INPUT, Keep.ALL]
    assert [order.index(k) for k in made] == sorted(order.index(k) for k in made), "what is kept is freed first"


@pytest.mark.parametrize("free", [0, GIB, 2 * GIB, 4 * GIB, 8 * GIB, 64 * GIB])
def test_a_plan_beside_attention_halves_on_the_host_fits_too(monkeypatch, layer, free):
    """It keeps as much of as many layers as without a host, or more: no layer's input stays for itself."""
    sizes, tokens = LayerBytes.of(layer, torch.bfloat16), 65536
    without = plan(monkeypatch, layer, free, tokens=tokens)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 640 * GIB)
    monkeypatch.setattr(memory, "host_link_rate", lambda device: 1e13)
    made = plan(monkeypatch, layer, free, tokens=tokens)
    kept, away = made.count(Keep.ALL), made.count(Keep.OFFLOADED_ATTENTION)
    held = tokens * ((kept - 1) * sizes.stash + (32 - away) * sizes.layer_input + (away > 0) * sizes.attention_half)
    floor = tokens * (sizes.layer_input + sizes.attention_half)
    margin = 0.06 * free + GIB // 2
    assert held + sizes.transient(tokens) <= max(free - margin, floor + sizes.transient(tokens))
    assert kept >= without.count(Keep.ALL) and (kept == 32 or away + kept == 32)
    small = plan(monkeypatch, layer, free, tokens=4096)
    assert Keep.OFFLOADED_ATTENTION not in small, "smaller batches are recorded"


def test_more_memory_keeps_more(monkeypatch, layer):
    kept = [plan(monkeypatch, layer, free * GIB, tokens=65536).count(Keep.ALL) for free in (1, 2, 4, 8, 64)]
    assert kept == sorted(kept) and kept[0] < kept[-1] == 32
    assert plan(monkeypatch, layer, 64 * GIB, tokens=65536, reserved=62 * GIB).count(Keep.ALL) < 32


def test_a_cpu_never_offloads(monkeypatch, layer):
    assert Keep.OFFLOADED_INPUT not in plan(monkeypatch, layer, 0, device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_estimate_of_what_a_layer_keeps_is_what_it_keeps(family):
    """Bytes that autograd's graph of one layer holds, against the planner's arithmetic."""
    config = FAMILIES[family]
    fast = with_lora(fast_copy(build(config)))
    decoder = fast.get_base_model().model
    x = torch.randn(2, 40, config.hidden_size)
    rope = decoder.rotary_emb(x, torch.arange(40)[None])
    fused = fused_layer(decoder.layers[0])
    out = decoder.layers[0](x, position_embeddings=rope)
    state = out.grad_fn.kept
    held = sum(
        value.numel() * value.element_size()
        for name in state.__slots__
        if isinstance(value := getattr(state, name), torch.Tensor) and name != "x"
    )
    held += state.attention.out.numel() * 4
    sizes = LayerBytes.of(fused, torch.float32)
    assert 0.85 * held <= sizes.stash * 80 <= 1.25 * held


def assert_same_bits(results):
    for other in results[1:]:
        assert other.loss == results[0].loss
        for name, grad in results[0].grads.items():
            assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_gives_the_same_bits(family, device, monkeypatch):
    monkeypatch.setattr(memory, "_SMALL_INPUTS", 0)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 64 * GIB)
    fast = with_lora(fast_copy(build(FAMILIES[family], device=device)))
    inputs = batch(FAMILIES[family], device=device)
    planner = getattr(fast.get_base_model(), PLANNER)
    results = []
    with deterministic():
        for setting in (False, True, "offload", "fastllm"):
            planner.use(setting)
            results.append(step(fast, inputs))
    assert_same_bits(results)


@pytest.mark.gpu
def test_layers_that_send_different_things_give_the_same_bits(device, monkeypatch):
    fast = with_lora(fast_copy(build(FAMILIES["llama"], device=device)))
    inputs = batch(FAMILIES["llama"], device=device)
    planner = getattr(fast.get_base_model(), PLANNER)
    low, high, keep = Keep.OFFLOADED_INPUT, Keep.OFFLOADED_ATTENTION, Keep.ALL
    results = []
    with deterministic():
        for made in ([keep] * 4, [high] * 3 + [keep], [low, low, high, keep], [low, high, high, keep]):
            planner.use("offload")
            monkeypatch.setattr(planner, "_make_plan", lambda *_, made=made: made)
            results += [step(fast, inputs) for _ in range(2)]
    assert_same_bits(results)


def test_the_plan_is_told_once_and_again_for_longer_batches(layer, messages):
    planner = ActivationPlanner(2, "fastllm")
    for length in (64, 64, 2048, 64, 2048):
        x = torch.empty(1, length, 128)
        for index in range(2):
            planner.keep(index, x, layer)
    assert messages().count("activations of up to") == 1  # both plans keep everything: one line
    assert len(planner._plans) == 2 and "2,048" in planner.describe()


@pytest.mark.parametrize(("is_fp8", "recorded_up_to"), [(False, 4096), (True, 8192)])
def test_recordings_of_every_shape_that_is_recorded_have_room(monkeypatch, is_fp8, recorded_up_to):
    """What layers may keep of their weights is what is left beside them."""
    model = fast_copy(build(FAMILIES["llama"])).requires_grad_(False)
    if is_fp8:
        use_fp8(model, model.model.layers)
    layer, spare = fused_layer(with_lora(model).get_base_model().model.layers[0]), []
    monkeypatch.setattr(memory.WeightKeeper, "allow", lambda self, bytes, *_: spare.append(bytes))
    sizes = LayerBytes.of(layer, torch.bfloat16)
    for tokens in (2048, 4096, 5120, 8192, 9216):
        plan(monkeypatch, layer, 64 * GIB, tokens=tokens)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "_recorded_bytes", lambda *_: 0)
            plan(monkeypatch, layer, 64 * GIB, tokens=tokens)
        needed = memory._recorded_bytes(sizes, tokens, 32, 32) if tokens <= recorded_up_to else 0
        assert spare[-1] - spare[-2] == needed


@pytest.mark.parametrize(
    ("setting", "tokens", "frees"), [("offload", 4096, True), ("offload", 8, False), (True, 4096, False)]
)
def test_weights_are_freed_where_inputs_are_offloaded(layer, setting, tokens, frees):
    """Larger batches under the setting of the least memory dequantise once more what they recompute with."""
    planner = ActivationPlanner(200, setting)
    planner._plan = planner._make_plan(layer, tokens, torch.device("cuda"), torch.bfloat16)
    assert planner.frees_weights == frees


@pytest.mark.parametrize(
    ("room", "link", "expected"),
    [
        (64 * GIB, 1e13, Keep.OFFLOADED_ATTENTION),
        (GIB // 8, 1e13, Keep.OFFLOADED_INPUT),
        (64 * GIB, 1e9, Keep.OFFLOADED_INPUT),
    ],
)
@pytest.mark.parametrize("setting", ["offload", "fastllm"])
def test_attention_goes_to_a_host_with_room_and_a_fast_link(
    monkeypatch, layer, messages, setting, room, link, expected
):
    monkeypatch.setattr(memory, "free_host_bytes", lambda: room)
    monkeypatch.setattr(memory, "host_link_rate", lambda device: link)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    planner = ActivationPlanner(32, setting)
    made = planner._make_plan(layer, 65536, torch.device("cuda"), torch.bfloat16)
    assert made == [expected] * 31 + [Keep.ALL]
    sizes = LayerBytes.of(layer, torch.bfloat16)
    each = sizes.attention_half if expected is Keep.OFFLOADED_ATTENTION else sizes.layer_input
    what = "inputs and attention halves" if expected is Keep.OFFLOADED_ATTENTION else "inputs"
    told = f"{what} of layers wait in host memory: about {31 * 65536 * each / GIB:.1f} GiB for 65,536 tokens"
    assert told in messages()


@pytest.mark.parametrize("setting", ["offload", "fastllm"])
@pytest.mark.parametrize("halves", [1, 13, 30])
def test_a_host_with_room_for_some_attention_halves_takes_those(monkeypatch, layer, messages, setting, halves):
    """Of the other layers it takes the inputs; no rows of gate and up go there as well."""
    sizes, tokens = LayerBytes.of(layer, torch.bfloat16), 65536
    takes = tokens * (halves * sizes.attention_half + (31 - halves) * sizes.layer_input)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 2 * takes + 1)
    monkeypatch.setattr(memory, "host_link_rate", lambda device: 1e13)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    planner = ActivationPlanner(32, setting)
    monkeypatch.setattr(planner._spare_link, "rows", lambda count: count)
    planner._plan = planner._make_plan(layer, tokens, torch.device("cuda"), torch.bfloat16)
    assert planner._plan == [Keep.OFFLOADED_INPUT] * (31 - halves) + [Keep.OFFLOADED_ATTENTION] * halves + [Keep.ALL]
    assert f"and attention halves of {halves} more" in messages() and planner.rows_away(30, 128) is None


def test_host_memory_that_activations_have_taken_counts_as_room(monkeypatch, layer):
    """A plan for another length, made while that of the first is taken, sends as much away as if it were alone."""
    sizes, cuda = LayerBytes.of(layer, torch.bfloat16), torch.device("cuda")
    needed = 2 * 31 * 65536 * sizes.attention_half + 1
    monkeypatch.setattr(memory, "host_link_rate", lambda device: 1e13)
    planner = ActivationPlanner(32, "offload")
    for tokens, taken in ((65536, 0), (49152, needed // 2)):
        monkeypatch.setattr(memory, "free_host_bytes", lambda taken=taken: needed - taken)
        monkeypatch.setattr(type(planner._offload), "nbytes", taken)
        made = planner._make_plan(layer, tokens, cuda, torch.bfloat16)
        assert made == [Keep.OFFLOADED_ATTENTION] * 31 + [Keep.ALL]


def test_the_estimate_of_an_attention_half_is_what_goes_to_the_host(layer, device):
    if device.type == "cuda":
        pytest.skip("a question of sizes alone, and the layer is on the CPU")
    sent = []

    def offload(tensors):
        sent.extend(tensors)
        return [tensor.clone for tensor in tensors]

    x = torch.randn(1, 40, 128, requires_grad=True)
    angles = (torch.ones(1, 40, layer.head_dim), torch.zeros(1, 40, layer.head_dim))
    case = AttentionCase(layer.head_dim**-0.5)
    call = LayerCall(*angles, case, Keep.OFFLOADED_ATTENTION, offload, choose_backend=lambda *_: "triton")
    decoder_layer(x, layer, call).sum().backward()
    assert sum(tensor.nbytes for tensor in sent) == 40 * LayerBytes.of(layer, torch.float32).attention_half


@pytest.mark.gpu
def test_host_memory_is_taken_once():
    """Parcels of the next step use it again, shorter ones too; longer ones take the place of shorter ones."""
    offload = HostOffload()

    def step(length):
        offload.begin()
        fetches = [offload.put([torch.full((length,), float(i), device="cuda")]) for i in range(3)]
        for i, (fetch,) in reversed(list(enumerate(fetches))):
            assert torch.equal(fetch(), torch.full((length,), float(i), device="cuda"))

    def held():
        (memory,) = offload._memories.values()
        offload.begin()
        return sorted((piece.data_ptr(), piece.numel()) for piece in memory._free)

    step(1 << 20)
    first = held()
    step(1 << 20)
    step(1000)
    assert held() == first and [size for _, size in first] == [4 << 20] * 3
    step(2 << 20)
    assert [size for _, size in held()] == [8 << 20] * 3
    offload.release()
    assert held() == []


@pytest.mark.gpu
def test_a_forward_without_a_backward_leaves_nothing_under_way():
    """What is on its way back to a tensor that nobody wants is there before its memory is used again."""
    offload = HostOffload()
    for _ in range(3):
        offload.begin()
        fetches = offload.put([torch.ones(64 << 20, device="cuda")])
        offload.turn()
        del fetches
        offload.begin()
        zeros = torch.zeros(64 << 20, device="cuda")
        torch.cuda.synchronize()
        assert not zeros.any()


@pytest.mark.gpu
@pytest.mark.parametrize("layers_tensors", [1, 3])
def test_offloaded_tensors_come_back_equal(layers_tensors):
    """Layer after layer sends away some tensors; from the last on they come back, while memory is used again."""
    offload = HostOffload()
    offload.begin()

    def new():
        return torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)

    layers = [[new() for _ in range(layers_tensors)] for _ in range(6)]
    expected = [[tensor.clone() for tensor in tensors] for tensors in layers]
    fetchers = []
    while layers:
        fetchers.append(offload.put(layers.pop(0)))
        new()  # would reuse memory that is freed too early
    for _ in range(2):  # two layers that stay
        offload.turn()
        new()
    for fetches, tensors in zip(reversed(fetchers), reversed(expected), strict=True):
        for fetch, tensor in zip(fetches, tensors, strict=True):
            assert torch.equal(fetch(), tensor)
            new()
