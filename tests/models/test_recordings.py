"""Layers of small batches run as recordings: the same training, whatever changes between the steps."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from fastllm.kernels.fp8 import CAPABILITY
from fastllm.kernels.layer_definition import Keep
from fastllm.kernels.recorded_pass import CudaRecorder
from fastllm.models import chains, recordings
from fastllm.models.arch import arch_of
from fastllm.models.chains import Chain, Known
from fastllm.models.fp8_compute import use_fp8
from fastllm.models.fused_parts import fused_layer
from fastllm.models.memory import ActivationPlanner, LayerBytes
from fastllm.models.model_methods import PLANNER
from fastllm.models.patch import decoder_layers
from fastllm.models.recordings import Recordings

from ..kernels.repetition import repeat
from .families import FAMILIES, build, fast_copy, with_lora
from .families import batch as batch_of_any_length

CONFIG = FAMILIES["llama"]


@pytest.fixture
def make(device):
    """Makes models that train alike: one that records (on a CPU by repetition), one that does not."""

    def make(config=CONFIG, *, setting=False):
        # In fp32 a GPU has no attention kernel that can be called by itself.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        plain = build(config, device=device, dtype=dtype)
        models = []
        for is_on in (True, False):
            model = with_lora(fast_copy(plain, setting=setting))
            planner = planner_of(model)
            planner.recordings = Recordings(None if device.type == "cuda" else lambda device: repeat)
            planner.recordings.is_on = is_on
            models.append(model.train())
        return models

    return make


def batch(config, *, length=64, **options):
    """Of a length that is not rounded up."""
    return batch_of_any_length(config, length=length, **options)


def planner_of(model) -> ActivationPlanner:
    return getattr(model.get_base_model(), PLANNER)


def recorded(model):
    """(shapes, layers) that are recorded."""
    shapes = planner_of(model).recordings._shapes.values()
    return sum(bool(shape.passes) for shape in shapes), sum(len(shape.passes) for shape in shapes)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(left, right):
    """On a GPU attention's backward adds in an order that changes from run to run, and steps in bf16 carry that on."""
    assert left.keys() == right.keys() and left
    if all(torch.equal(left[name], expected) for name, expected in right.items()):
        return
    assert next(iter(right.values())).is_cuda, "not the same bits"
    difference = sum(float((left[name] - expected).square().sum()) for name, expected in right.items())
    assert difference < 0.03**2 * sum(float(expected.square().sum()) for expected in right.values())


def train(model, device, *, steps=5, batches=None, accumulate=1, config=CONFIG, change=None):
    """Losses and the gradients of each optimiser step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses, grads = [], []
    batches = batches or [batch(config, seed=seed, device=device) for seed in range(steps * accumulate)]
    for index in range(0, len(batches), accumulate):
        if change is not None:
            change(model, index)
        for inputs in batches[index : index + accumulate]:
            loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        grads.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, grads


def assert_trained_alike(left, right):
    ours, theirs = (torch.stack(losses) for losses in (left[0], right[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.device.type == "cpu" else 2e-3, atol=0)
    for ours, theirs in zip(left[1], right[1], strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize("setting", [False, True, "offload", "fastllm"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
def test_training_is_the_same(make, device, family, setting):
    """From the third batch of a shape on its layers are replayed, however they hold their activations."""
    config = FAMILIES[family]
    with_recordings, without = make(config, setting=setting)
    assert_trained_alike(train(with_recordings, device, config=config), train(without, device, config=config))
    assert recorded(with_recordings) == (1, 4) and recorded(without) == (0, 0)


def replays(model, inputs, monkeypatch):
    """How many layers each call of a forward runs."""
    found, real = [], chains.replay

    def counting(passes, x, started):
        found.append(len(passes))
        return real(passes, x, started)

    with monkeypatch.context() as patched:
        patched.setattr(chains, "replay", counting)
        model(**inputs).loss.backward()
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("family", "expected"), [("llama", [4]), ("qwen3", [4]), ("gemma3_text", [1, 1, 1, 1])])
def test_layers_that_are_given_the_same_run_in_one_call(make, device, monkeypatch, family, expected):
    """Those of Gemma 3 have rotary angles of two kinds by turns."""
    config = FAMILIES[family]
    model, _ = make(config)
    train(model, device, config=config)
    inputs = batch(config, device=device)
    assert replays(model, inputs, monkeypatch) == expected
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    found = replays(model, inputs, monkeypatch)
    handle.remove()
    assert found == [1] * 4, "a hook for all modules sees the output of each"


def test_the_gpu_is_busy_while_the_host_looks_for_the_layers_that_follow(make, device, monkeypatch):
    model, _ = make()
    train(model, device)
    inputs, busy, real = batch(CONFIG, device=device), [], Known.runs_after

    def watched(self, other):
        (shape,) = planner_of(model).recordings._shapes.values()
        busy.append(shape.passes[0].recorded.is_busy)
        return real(self, other)

    monkeypatch.setattr(Known, "runs_after", watched)
    assert replays(model, inputs, monkeypatch) == [4] and busy == [True] * 3


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_a_layer_gives_is_what_the_next_one_gets(family, device):
    """So that one call may run both: nothing stands between them."""
    model = fast_copy(build(FAMILIES[family], device=device)).train()
    layers = decoder_layers(model, arch_of(model.config))
    given, got = [], []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: got.append(args[0]))
        layer.register_forward_hook(lambda _, args, output: given.append(output))
    model(**batch(FAMILIES[family], device=device))
    assert all(layer.hands_on for layer in layers) and len(got) == len(layers)
    assert all(output is x for output, x in zip(given, got[1:], strict=False))


def test_hidden_states_that_change_between_layers_are_an_error():
    known = Known(SimpleNamespace(), None, (), None)
    x = torch.ones(2)
    chain = Chain(0, [known, known, known], x, call=None)
    assert [index in chain for index in range(4)] == [False, True, True, False]
    with pytest.raises(RuntimeError, match="changed between two layers"):
        chain.passed(1, x + 1, call=None)


def test_the_report_tells_how_many_shapes_are_recorded(make, device):
    model, _ = make()
    train(model, device)
    assert "launches of 1 batch shapes are recorded" in str(model.get_base_model().fast_report())


def test_gradients_accumulate(make, device):
    """A replay writes to new gradients, not to those of the micro-batch before it."""
    with_recordings, without = make()
    runs = [train(model, device, steps=3, accumulate=3) for model in (with_recordings, without)]
    assert_trained_alike(*runs)


def test_full_fine_tuning(make, device):
    """Weights are read where the optimiser changes them."""
    runs = []
    for model in make():
        model.requires_grad_(True)
        runs.append(train(model, device))
        assert recorded(model)[0] == planner_of(model).recordings.is_on
    assert any("q_proj.base_layer.weight" in name for name in runs[0][1][0])
    assert_trained_alike(*runs)


def test_shapes_alternate(make, device):
    batches = [batch(CONFIG, seed=i, device=device, rows=1 + i % 2, length=64 * (1 + i % 3)) for i in range(24)]
    with_recordings, without = make()
    assert_trained_alike(*(train(model, device, batches=batches) for model in (with_recordings, without)))
    assert recorded(with_recordings) == (6, 24)


def test_lengths_are_rounded_up_so_that_shapes_come_again(make, device):
    """Batches of 8 lengths are of two shapes to the layers; loss, gradients and logits know nothing of it."""
    lengths = [20, 31, 44, 58, 64, 70, 90, 101]
    batches = [batch(CONFIG, seed=i, device=device, length=length) for i, length in enumerate(lengths)]
    with_recordings, without = make()
    ours, theirs = (train(model, device, batches=batches) for model in (with_recordings, without))
    tolerance = {"rtol": 1e-5} if device.type == "cpu" else {"rtol": 2e-3}
    torch.testing.assert_close(torch.stack(ours[0]), torch.stack(theirs[0]), **tolerance, atol=0)
    for left, right in zip(ours[1], theirs[1], strict=True):
        for name, expected in right.items():
            limit = 1e-5 if device.type == "cpu" else 0.1  # other shapes are rounded differently, step after step
            assert float((left[name] - expected).norm()) <= limit * float(expected.norm()), name
    assert recorded(with_recordings) == (2, 8)
    inputs = batch(CONFIG, seed=1, device=device, length=31)
    found, expected = (model(**inputs).logits[:, 3:5].detach().float() for model in (with_recordings, without))
    assert with_recordings(**inputs).logits.shape[1] == 31
    assert float((found - expected).norm()) <= limit * float(expected.norm())


def test_lengths_stay_what_they_are_where_a_gpu_has_no_time_to_spare(make, device, monkeypatch):
    """As on a T4, which computes for longer than the host takes to launch."""
    monkeypatch.setattr(recordings, "product_rate", lambda device: 1e9)
    model, _ = make()
    train(
        model,
        device,
        batches=[batch(CONFIG, seed=i, device=device, length=length) for i, length in enumerate(range(20, 26))],
    )
    assert [key[2] for key in planner_of(model).recordings._shapes] == [20, 21, 22, 23, 24, 25]


def test_lengths_stay_what_they_are_where_angles_depend_on_them(make, device):
    config = copy.deepcopy(CONFIG)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model, _ = make(config)
    train(model, device, batches=[batch(config, seed=length, device=device, length=length) for length in range(20, 24)])
    assert [key[2] for key in planner_of(model).recordings._shapes] == [20, 21, 22, 23]


def test_a_length_that_repeats_stays_what_it_is(make, device):
    batches = [batch(CONFIG, seed=seed, device=device, length=29) for seed in range(5)]
    with_recordings, without = make()
    assert_trained_alike(*(train(model, device, batches=batches) for model in (with_recordings, without)))
    assert [key[2] for key, shape in planner_of(with_recordings).recordings._shapes.items() if shape.passes] == [29]


def test_positions_and_masks_of_each_batch_count(make, device):
    """Left padding comes with a mask, and packed rows with boundaries: both change from batch to batch."""
    batches = []
    for seed in range(5):
        inputs = batch(CONFIG, seed=seed, device=device)
        shift = seed + 1
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :shift] = 0
        batches.append({**inputs, "attention_mask": mask})
    for seed in range(6):
        inputs = batch(CONFIG, seed=seed, device=device, rows=1, length=24)
        first = 16 if seed % 2 else 8  # the longer document has 16 tokens: one shape to a kernel
        positions = torch.cat([torch.arange(first), torch.arange(24 - first)])[None].to(device)
        batches.append({"input_ids": inputs["input_ids"], "labels": inputs["labels"], "position_ids": positions})
    with_recordings, without = make()
    assert_trained_alike(*(train(model, device, batches=batches) for model in (with_recordings, without)))


def test_two_forwards_may_wait_for_their_backwards(make, device):
    """As in preference training without concatenation: the second is not recorded, and neither is disturbed."""
    for model_grads in [[]]:
        for model in make():
            train(model, device)
            first, second = (model(**batch(CONFIG, seed=seed, device=device)).loss for seed in (10, 11))
            (first - 2 * second).backward()
            model_grads.append(gradients(model))
        assert_alike(*model_grads)


def test_a_forward_may_be_dropped(make, device):
    found = []
    for model in make():
        train(model, device)
        for _ in range(2):
            model(**batch(CONFIG, seed=20, device=device))
            gc.collect()
        model(**batch(CONFIG, seed=21, device=device)).loss.backward()
        found.append(gradients(model))
    assert_alike(*found)


def test_evaluation_between_steps(make, device):
    with_recordings, without = make()

    def evaluate(model, index):
        with torch.no_grad():
            model.eval()(**batch(CONFIG, seed=30 + index, device=device))
        model.train()

    assert_trained_alike(*(train(model, device, change=evaluate) for model in (with_recordings, without)))
    assert recorded(with_recordings) == (1, 4)


CHANGES = {
    "a frozen adapter matrix": lambda model: next(
        p for n, p in model.named_parameters() if "lora_A" in n
    ).requires_grad_(False),
    "new memory": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "a scaling": lambda model: [
        module.scaling.update(default=3.0) for module in model.modules() if hasattr(module, "lora_A")
    ],
    "another adapter": lambda model: (
        model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "down_proj"])), model.set_adapter("other")
    ),
    "a hook": lambda model: model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None),
    "a setting": lambda model: model.get_base_model().for_training(True),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_is_recorded_anew(make, device, change):
    def at_the_fourth_step(model, index):
        if index == 3:
            torch.manual_seed(0)
            change(model)

    runs = [train(model, device, steps=8, change=at_the_fourth_step) for model in make()]
    assert_trained_alike(*runs)


def test_what_changes_all_the_time_is_recorded_less_and_less(make, device):
    """As the memory of sharded parameters does: recording takes time, too."""
    model, without = make()
    recordings_of = planner_of(model).recordings
    made = []

    def new_memory(model, index):
        made.append(recordings_of.count)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    assert_trained_alike(*(train(each, device, steps=24, change=new_memory) for each in (model, without)))
    assert sum(made[:24]) == 3, "at the third batch, the eighth and the seventeenth"


@pytest.mark.parametrize(("index", "has_backward", "fits"), [(4, False, True), (2, False, False), (4, True, False)])
def test_layers_are_recorded_in_order_and_before_any_backward(index, has_backward, fits):
    """Recordings share memory: what a layer keeps must not lie where a pass that runs after it writes."""
    shape = recordings._Shape(torch.device("cpu"), None)
    for known in (1, 3):
        recorded = SimpleNamespace(has_backward=has_backward)
        shape.passes[known] = Known(recorded, None, (), None)
    assert shape.takes(index) == fits


def test_hidden_states_that_are_asked_for_stay_what_they_are(make, device):
    model, _ = make()
    train(model, device)
    outputs = model(**batch(CONFIG, seed=1, device=device), output_hidden_states=True)
    first = [state.detach() for state in outputs.hidden_states]
    del outputs
    before = [state.clone() for state in first]
    model(**batch(CONFIG, seed=2, device=device), output_hidden_states=True).loss.backward()
    assert all(torch.equal(now, then) for now, then in zip(first, before, strict=True))


def test_a_second_backward_is_refused(make, device):
    model, _ = make()
    train(model, device)
    loss = model(**batch(CONFIG, device=device)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        loss.backward()


@pytest.mark.parametrize("number", [1, 3, 6, 8], ids=["first forward", "third forward", "second backward", "last"])
def test_what_can_not_be_recorded_runs_without(make, device, messages, number):
    """Four layers: four recordings of forwards, then four of backwards, of which one fails."""
    with_recordings, without = make()
    real = planner_of(with_recordings).recordings._record or CudaRecorder
    count = 0

    def failing(device):
        record = real(device)

        def run(function):
            nonlocal count
            count += 1
            if count == number:
                raise RuntimeError("out of luck")
            return record(function)

        return run

    planner_of(with_recordings).recordings._record = failing
    assert_trained_alike(*(train(model, device) for model in (with_recordings, without)))
    assert recorded(with_recordings) == (0, 0) and messages().count("out of luck") == 1


def test_layers_are_recorded_all_or_not_at_all(make, device, monkeypatch):
    """Of a batch whose inputs are in host memory the last layer would be recorded alone, with memory of its own."""
    model, without = make(setting="offload")
    for each in (model, without):
        planner = planner_of(each)
        plan = [Keep.OFFLOADED_INPUT] * 3 + [Keep.ALL]
        monkeypatch.setattr(planner, "_make_plan", lambda *_, plan=plan: plan)
        monkeypatch.setattr(planner, "offload", lambda tensors: [lambda tensor=tensor: tensor for tensor in tensors])
        assert not planner.frees_weights
    assert_trained_alike(train(model, device), train(without, device))
    assert recorded(model) == (0, 0) and planner_of(model).frees_weights


def test_dropout_is_never_recorded(make, device):
    model, _ = make()
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    train(model, device)
    assert recorded(model) == (0, 0)


def test_large_batches_and_full_memory_are_not_recorded(make, device, monkeypatch):
    model, _ = make()
    monkeypatch.setattr(recordings, "MOST_ROWS", 10)
    train(model, device)
    assert recorded(model) == (0, 0)
    monkeypatch.setattr(recordings, "MOST_ROWS", 4096)
    with monkeypatch.context() as full:
        full.setattr(recordings, "free_bytes", lambda device: 1000)
        train(model, device)
    assert recorded(model) == (0, 0)
    planner_of(model).recordings = Recordings(planner_of(model).recordings._record)
    planner_of(model).recordings.beside = 2**60  # a batch of another shape, seen before, takes it all
    train(model, device)
    assert recorded(model) == (0, 0)


@pytest.mark.parametrize(("products", "expected"), [("16 bit", 0), ("one group in 16 bit", 0), ("FP8", 1)])
def test_layers_in_fp8_are_recorded_up_to_twice_the_rows(make, device, monkeypatch, products, expected):
    if device.type == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("this GPU has no FP8 products")
    batches = [batch(CONFIG, seed=seed, device=device, rows=2) for seed in range(4)]
    for limit, count in ((2 * 64, 1), (2 * 64 - 1, expected), (64, expected), (64 - 1, 0)):
        model, without = make()
        for each in (model, without):
            base = each.get_base_model()
            base.requires_grad_(False)
            for name, parameter in base.named_parameters():
                trains_weight = products == "one group in 16 bit" and "down_proj.base" in name
                parameter.requires_grad_("lora" in name or trains_weight)
            if products != "16 bit":
                use_fp8(base, decoder_layers(base, arch_of(base.config)))
        monkeypatch.setattr(recordings, "MOST_ROWS", limit)
        assert_trained_alike(*(train(each, device, batches=batches) for each in (model, without)))
        assert recorded(model) == (count, 4 * count)


def test_the_plan_leaves_room_for_its_largest_batch(make, device):
    model, _ = make(setting="fastllm")
    train(model, device, batches=[batch(CONFIG, device=device, rows=rows) for rows in (1, 8, 1, 1)])
    small = LayerBytes.of(fused_layer(model.get_base_model().model.layers[0]), model.dtype)
    assert planner_of(model).recordings.beside >= 8 * 64 * 4 * (small.stash + small.layer_input)


def test_a_copied_model_makes_its_own(make, device):
    model, _ = make()
    train(model, device)
    twin = copy.deepcopy(model)
    assert recorded(twin) == (0, 0)
    twin(**batch(CONFIG, device=device)).loss.backward()


def test_inference_frees_them(make, device):
    model, _ = make()
    train(model, device)
    model.get_base_model().for_inference()
    assert recorded(model) == (0, 0)
