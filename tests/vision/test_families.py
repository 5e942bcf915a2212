"""A training step and a greedy answer of each vision-language family, beside plain transformers + PEFT."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Dinov2Config, LlamaConfig, Olmo2Config

from fastllm.models.arch import arch_of
from fastllm.models.vision_layout import outside_the_decoder
from tests.models.families import fast_copy, float64_twin, step, with_lora

from .families import FAMILIES, batch, llava

FP32_ULP = 2.0**-23
LOSS_BATCHES = 16
# Our distance from float64 at most, as a multiple of transformers' own; in fp32 the order of sums alone differs.
WHOLE = {torch.float32: 1.25, torch.bfloat16: 1.1}
WORST = 2.0
BACKSTOP = {torch.float32: 1e-6, torch.bfloat16: 0.0}
TARGETS = (
    r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    r"|.*(visual|vision_tower|vision_model).*(blocks|layers).*\.(qkv|proj|(q|k|v|o|out|gate|up|down)_proj|\w*fc[12])"
)


def build(config, device):
    """A transformers model with weights spread out enough that every part of it matters."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model.to(device)


def pair(family, device, dtype=torch.float32, setting=False):
    """(fastllm's model, the same under transformers + PEFT)."""
    plain = build(FAMILIES[family], device).to(dtype)
    return tuple(with_lora(model, target_modules=TARGETS) for model in (fast_copy(plain, setting=setting), plain))


def in_dtype(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("dtype", "setting"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["fp32-keep", "fp32-recompute", "bf16-recompute"],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_no_farther_from_float64_than_transformers(family, dtype, setting, device):
    config = FAMILIES[family]
    fast, plain = pair(family, device, dtype, setting)
    text = config.get_text_config()
    crossing = getattr(text, "cross_attention_layers", [])
    assert fast.fast_report().num_fused == text.num_hidden_layers - len(crossing)
    assert ("2 layers run parts: their attention is cross-attention" in str(fast.fast_report())) == bool(crossing)
    assert fast.fast_report().head == "head and loss fused"
    gated = 1 if family == "mllama" else 0  # blocks of its tower
    assert [block.path for block in fast.fast_report().vision] == ["fused"] * 2 + ["transformers"] * gated
    twin = copy.deepcopy(plain).double()
    squares = {"ours": {}, "theirs": {}}
    autocast = None if dtype is torch.float32 else dtype
    for seed in range(3):
        inputs = batch(config, device=device, seed=seed)
        truth = step(twin, in_dtype(inputs, torch.float64))
        for name, model in (("ours", fast), ("theirs", plain)):
            found = step(model, in_dtype(inputs, dtype), autocast=autocast)
            assert found.grads.keys() == truth.grads.keys()
            for kind, value in found.distance(truth).items():
                squares[name][kind] = squares[name].get(kind, 0.0) + value**2 / 3
    ours, theirs = ({kind: value**0.5 for kind, value in side.items()} for side in squares.values())
    assert ours["whole"] <= max(WHOLE[dtype] * theirs["whole"], BACKSTOP[dtype])
    assert ours["worst"] <= max(WORST * theirs["worst"], BACKSTOP[dtype])
    if dtype is torch.float32:
        ours, theirs = loss_errors(twin, (fast, plain), config, device)
        assert ours <= max(1.1 * theirs, FP32_ULP)
    else:
        assert ours["loss"] <= 2e-3


@torch.no_grad()
def loss_errors(twin, models, config, device):
    """RMS over batches of each model's relative distance from the loss of its float64 `twin`. A loss is one number and
    its rounding luck, so it takes many."""
    squares = [0.0 for _ in models]
    for seed in range(LOSS_BATCHES):
        inputs = batch(config, device=device, seed=seed)
        truth = float(twin(**in_dtype(inputs, torch.float64)).loss)
        for index, model in enumerate(models):
            squares[index] += (float(model(**inputs).loss) / truth - 1) ** 2 / LOSS_BATCHES
    return [square**0.5 for square in squares]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_a_4_bit_decoder(family, tmp_path, device):
    """The decoder in NF4, all else in fp32."""
    config = FAMILIES[family]
    model = build(config, device)
    model.save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=outside_the_decoder(model),
    )  # fmt: skip
    plain = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32, device_map={"": str(device)}
    )
    fast, plain = (with_lora(each, target_modules=TARGETS) for each in (fast_copy(plain, setting=True), plain))
    assert fast.fast_report().num_fused >= 2
    twin = float64_twin(plain, AutoModelForImageTextToText)
    inputs = batch(config, device=device)
    truth = step(twin, in_dtype(inputs, torch.float64))
    ours, theirs = (step(each, inputs).distance(truth) for each in (fast, plain))
    for kind, factor in {"loss": 1.1, "whole": 1.1, "worst": WORST}.items():
        assert ours[kind] <= max(factor * theirs[kind], 3e-6), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family, device):
    fast, plain = pair(family, device)
    inputs = {name: value for name, value in batch(FAMILIES[family], device=device).items() if name != "labels"}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:  # padding on the left
            inputs[name][1] = inputs[name][1].roll(4)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ours, theirs = (model.eval().generate(**inputs, **settings) for model in (fast, plain))
    assert torch.equal(ours, theirs)


def test_a_decoder_without_fast_classes():
    """The model around it then has none either."""
    assert arch_of(llava(LlamaConfig())) is not None
    assert arch_of(llava(Olmo2Config())) is None


def test_a_tower_without_fast_classes(device):
    """It runs transformers' own forward before the fused decoder, and the report says so."""
    tower = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    told = str(fast_copy(build(llava(FAMILIES["llava-llama"].text_config, tower), device)).fast_report())
    assert "3 of 3 decoder layers fused" in told and "the vision tower runs transformers' own forward" in told
