"""One training step of each family, beside plain transformers + PEFT, both judged by the float64 model.

The standard: no farther from float64 than transformers itself is, times 1.1, for the whole gradient, its median and
95th percentile over tensors and the RMS of the loss error over batches; no tensor worse than twice.
"""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastllm.kernels.decoder_layer import decoder_layer
from fastllm.models import blocks

from ..kernels.parity import OverLimit
from .families import FAMILIES, batch, build, fast_copy, float64_twin, step, with_lora

BATCHES = 6
LOSS_BATCHES = 64 if torch.cuda.is_available() else 32
# Both sides round the loss to fp32; within one unit in the last place the comparison is luck.
FP32_ULP = 2.0**-23
# An RMS of n errors is known to 1 / sqrt(2 n) of itself, and the ratio of two of them to 1 / sqrt(n).
LOSS_LUCK = 3 / LOSS_BATCHES**0.5
# Our distance from float64 at most, as a multiple of transformers' own.
FACTORS = {"whole": 1.1, "median": 1.1, "p95": 1.1, "worst": 2.0, "loss": 1.1}
# fp32 gradients differ by the order of sums alone, where neither side's order is privileged: two attention backends of
# transformers are a factor of three apart.
FP32_FACTORS = {"whole": 1.25, "median": 1.25, "p95": 1.25}
# Largest whole-gradient error that a LoRA step may have at all, or transformers' own where that is larger.
BACKSTOP = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def errors_over_batches(fast, plain, twin, config, *, device, autocast, **inputs_too):
    """RMS over batches of each distance from float64: (ours, transformers')."""
    squares = [{}, {}]
    scale = 1024.0 if autocast is torch.float16 else 1.0
    for seed in range(BATCHES):
        inputs = {**batch(config, seed=seed, device=device), **inputs_too}
        truth = step(twin, inputs)
        for total, model in zip(squares, (fast, plain), strict=True):
            for name, value in step(model, inputs, autocast=autocast, loss_scale=scale).distance(truth).items():
                total[name] = total.get(name, 0.0) + value**2 / BATCHES
    rms = [{name: math.sqrt(value) for name, value in total.items()} for total in squares]
    # One loss is a single number and its error luck: it takes more batches, and no backward.
    inputs = [batch(config, seed=seed, device=device) for seed in range(LOSS_BATCHES)]
    truth = [loss_of(twin, each, None) for each in inputs]
    for total, model in zip(rms, (fast, plain), strict=True):
        relative = [loss_of(model, each, autocast) / right - 1 for each, right in zip(inputs, truth, strict=True)]
        total["loss"] = math.sqrt(sum(error**2 for error in relative) / LOSS_BATCHES)
    return rms


def loss_of(model, inputs, autocast):
    with torch.no_grad(), torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        return float(model.train()(**inputs).loss)


def check(ours, theirs, backstop=None):
    allowed = {name: factor * theirs[name] for name, factor in FACTORS.items()}
    allowed["loss"] = max(allowed["loss"], FP32_ULP)
    if backstop == BACKSTOP[torch.float32]:
        allowed |= {name: factor * theirs[name] for name, factor in FP32_FACTORS.items()}
    else:
        allowed["loss"] *= 1 + LOSS_LUCK
    if backstop is not None:
        allowed["whole"] = min(allowed["whole"], max(backstop, theirs["whole"]))
    for name, most in allowed.items():
        if not ours[name] <= most:
            raise OverLimit(f"{name}: {ours[name]:.2e} > {most:.2e}, transformers {theirs[name]:.2e}")


def check_same_step(fast, plain, inputs):
    """Loss and gradients of one fp32 step, beside each other: apart by the order of sums only."""
    expected, got = step(plain, inputs), step(fast, inputs)
    if set(got.grads) != set(expected.grads):
        raise OverLimit(f"other tensors are trained: {set(got.grads) ^ set(expected.grads)}")
    distance = got.distance(expected)
    for name, most in {"loss": 1e-6, "whole": 6e-6, "worst": 2e-5}.items():
        if not distance[name] <= most:
            raise OverLimit(f"{name}: {distance[name]:.2e} > {most:.2e}")


def dtypes_here():
    return [torch.float32, torch.bfloat16, torch.float16] if torch.cuda.is_available() else [torch.float32]


@pytest.mark.parametrize("setting", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("dtype", dtypes_here(), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_step(family, dtype, setting, device):
    config = FAMILIES[family]
    plain = build(config, dtype=dtype, device=device)
    fast, plain = with_lora(fast_copy(plain, setting=setting)), with_lora(plain)
    assert fast.fast_report().num_fused == config.num_hidden_layers
    ours, theirs = errors_over_batches(
        fast, plain, float64_twin(plain), config, device=device, autocast=None if dtype is torch.float32 else dtype
    )
    check(ours, theirs, BACKSTOP[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_step_module_by_module(family, device):
    """Where layers can't run as one node, here because a cache is asked for, their modules have fast forwards."""
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    ours, theirs = errors_over_batches(
        fast, plain, float64_twin(plain), config, device=device, autocast=None, use_cache=True
    )
    check(ours, theirs, BACKSTOP[torch.float32])


@pytest.mark.parametrize(("use_cache", "fused"), [(None, 4), (False, 4), (True, 0)])
def test_a_training_step_runs_whole_layers(use_cache, fused, device, monkeypatch):
    """Also of a model whose config asks for a cache, as it does after generating."""
    config = FAMILIES["llama"]
    fast = with_lora(fast_copy(build(config, device=device)))
    assert fast.config.use_cache
    ran = []
    monkeypatch.setattr(blocks, "decoder_layer", lambda *args: ran.append(args) or decoder_layer(*args))
    step(fast, {**batch(config, device=device), "use_cache": use_cache})
    assert len(ran) == fused


@pytest.mark.parametrize("dtype", dtypes_here(), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_lora_step(family, dtype, device, tmp_path):
    config = FAMILIES[family]
    build(config).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=dtype, device_map={"": str(device)},
        attn_implementation=config._attn_implementation,
    )  # fmt: skip
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    assert fast.fast_report().num_fused == config.num_hidden_layers
    ours, theirs = errors_over_batches(
        fast, plain, float64_twin(plain), config, device=device, autocast=None if dtype is torch.float32 else dtype
    )
    check(ours, theirs, BACKSTOP[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_step(family, device):
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, twin = fast_copy(plain), copy.deepcopy(plain).double()
    ours, theirs = errors_over_batches(fast, plain, twin, config, device=device, autocast=None)
    check(ours, theirs, BACKSTOP[torch.float32])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mixed_precision_full_fine_tuning_step(family, device):
    """fp32 weights under bf16 autocast: the residual stream stays fp32, products are bf16."""
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, twin = fast_copy(plain), copy.deepcopy(plain).double()
    ours, theirs = errors_over_batches(fast, plain, twin, config, device=device, autocast=torch.bfloat16)
    check(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.2},
        {"bias": "all"},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "r": 3},
        {"target_modules": r".*(v_proj|lm_head)"},
        {"layers_to_transform": [1, 3]},
    ],
    ids=lambda options: "-".join(f"{k}" for k in options),
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapter_options(family, options, device):
    """Every adapter option trains as under PEFT: the same loss and gradients, fused or not."""
    if "lora_dropout" in options:
        device = torch.device("cpu")  # where PEFT's dropout draws the same numbers as ours
    if family == "qwen2" and "modules_to_save" in options:
        options = {**options, "ensure_weight_tying": True}
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain), **options), with_lora(plain, **options)
    check_same_step(fast, plain, batch(config, device=device))
    fused = fast.fast_report().num_fused
    assert fused == (0 if options.get("use_dora") else config.num_hidden_layers)


def left_padded(config, device):
    inputs = batch(config, device=device)
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def packed(config, device):
    """Two documents in one row, told apart by their positions."""
    inputs = batch(config, device=device, rows=1)
    inputs["attention_mask"] = None
    inputs["position_ids"] = torch.cat([torch.arange(11), torch.arange(18)])[None].to(device)
    inputs["use_cache"] = False
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_packed_documents(family, device):
    """Masks that causal attention does not imply reach the attention kernel."""
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    for inputs in (left_padded(config, device), packed(config, device)):
        check_same_step(fast, plain, inputs)


def test_logits_on_request_carry_gradients(device):
    """`outputs.logits` is computed when it is looked at, equals transformers', and differentiates."""
    config = FAMILIES["llama"]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    inputs = batch(config, device=device)
    ours, theirs = fast(**inputs), plain(**inputs)
    assert ours.logits.shape == theirs.logits.shape
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[shown], theirs.logits[shown], rtol=1e-4, atol=1e-5)
    for model, outputs in ((fast, ours), (plain, theirs)):
        model.zero_grad()
        outputs.logits[shown].square().mean().backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_the_same(family, device):
    """Ragged left-padded prompts, with an adapter, in training and in evaluation mode."""
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain).eval()
    prompts = batch(config, device=device, length=12)
    inputs = {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"].flip(1)}
    expected = plain.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(fast.train().generate(**inputs, max_new_tokens=12, do_sample=False), expected)
    assert fast.training
    assert torch.equal(fast.eval().generate(inputs, max_new_tokens=12, do_sample=False), expected)
