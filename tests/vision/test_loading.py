"""`FastVisionModel` and `FastModel`: loading in every precision, and which layers get adapters."""

import inspect
import re

import pytest
from torch import nn

import fastllm
from fastllm import FastLanguageModel, FastModel, FastVisionModel
from fastllm._errors import ArgumentError, UnsupportedError
from tests.models.conftest import make_checkpoint
from tests.models.test_language import LOAD_ARGUMENTS, PEFT_ARGUMENTS

from .conftest import picture

SWITCHES = {
    "finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules",
    "finetune_audio_layers",
}  # fmt: skip


def adapted(model):
    """Names of the layers that have an adapter."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


def kinds(model):
    return {re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in adapted(model)}


def test_every_argument_of_the_drop_in_calls_is_there():
    extra = {"auto_model", "fullgraph", "return_logits", "whisper_language", "whisper_task", "unsloth_force_compile"}
    assert set(inspect.signature(FastVisionModel.from_pretrained).parameters) >= LOAD_ARGUMENTS | extra
    assert set(inspect.signature(FastVisionModel.get_peft_model).parameters) >= PEFT_ARGUMENTS | SWITCHES
    assert fastllm.FastVisionModel is FastVisionModel


def test_a_vision_model_comes_with_its_processor(checkpoint, family, messages):
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    assert model.config.model_type == family
    inputs = processor(
        picture(), "<|vision_start|><|image_pad|><|vision_end|>what", add_special_tokens=False, return_tensors="pt"
    )
    assert model(**inputs.to(model.device)).logits.shape[-1] == 512
    assert processor.tokenizer.padding_side == "left"
    assert f"{family}: {checkpoint}" in messages()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_loading_spares_the_tower(checkpoint, bits):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    packed = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    decoder = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.language_model.")
    }
    assert packed == decoder


def test_full_finetuning_trains_everything(checkpoint, messages):
    model, _ = FastVisionModel.from_pretrained(checkpoint, full_finetuning=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert FastVisionModel.get_peft_model(model) is model
    assert "no adapter is added" in messages()


TOWER = {
    "qwen2_vl": {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"},
    "qwen2_5_vl": {"attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
}
ATTENTION = {f"self_attn.{p}_proj" for p in "qkvo"}
MLP = {f"mlp.{p}_proj" for p in ("gate", "up", "down")}


def tower(family, part=""):
    return {f"model.visual.blocks.N.{name}" for name in TOWER[family] if part in name}


def decoder(names):
    return {f"model.language_model.layers.N.{name}" for name in names}


@pytest.mark.parametrize(
    ("asked", "in_tower", "in_decoder"),
    [
        ({}, "", ATTENTION | MLP),
        ({"finetune_vision_layers": False}, None, ATTENTION | MLP),
        ({"finetune_language_layers": False}, "", set()),
        ({"finetune_attention_modules": False}, "mlp", MLP),
        ({"finetune_mlp_modules": False}, "attn", ATTENTION),
        ({"finetune_mlp_modules": False, "finetune_vision_layers": False}, None, ATTENTION),
        ({"target_modules": "all-linear", "finetune_mlp_modules": False}, "", ATTENTION | MLP),
        ({"target_modules": ["q_proj", "v_proj"]}, None, {"self_attn.q_proj", "self_attn.v_proj"}),
        ({"target_modules": ["qkv", "q_proj"], "finetune_vision_layers": False}, None, {"self_attn.q_proj"}),
        ({"target_modules": "['down_proj', 'o_proj']", "finetune_vision_layers": False}, None,
         {"mlp.down_proj", "self_attn.o_proj"}),
        ({"target_modules": r".*language_model.*\.q_proj"}, None, {"self_attn.q_proj"}),
    ],
)  # fmt: skip
def test_switches_choose_the_layers(checkpoint, family, asked, in_tower, in_decoder):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastVisionModel.get_peft_model(model, r=2, **asked)
    assert kinds(model) == (set() if in_tower is None else tower(family, in_tower)) | decoder(in_decoder)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_the_report_says_what_runs_fused(checkpoint):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    told = str(FastVisionModel.get_peft_model(model).fast_report())
    assert "2 of 2 decoder layers fused" in told and "2 of 2 vision blocks fused" in told
    plain, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, patch=False)
    assert "transformers' own forward" in str(plain.fast_report()) and plain.fast_report().num_fused == 0


def test_the_last_decoder_layers(checkpoint):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    with pytest.raises(UnsupportedError, match="finetune_vision_layers=False"):
        FastVisionModel.get_peft_model(model, finetune_last_n_layers=1)
    model = FastVisionModel.get_peft_model(model, finetune_vision_layers=False, finetune_last_n_layers=1)
    assert adapted(model) == {f"model.language_model.layers.1.{name}" for name in ATTENTION | MLP}


def test_vocabulary_modules_are_trained_in_full(checkpoint):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastVisionModel.get_peft_model(model, target_modules=["q_proj", "lm_head"], finetune_vision_layers=False)
    assert model.lm_head.modules_to_save["default"].weight.requires_grad


@pytest.mark.parametrize(
    "asked",
    [
        {"finetune_vision_layers": False, "finetune_language_layers": False},
        {"finetune_attention_modules": False, "finetune_mlp_modules": False},
        {"target_modules": ["qkv"], "finetune_vision_layers": False},
        {"target_modules": ["q_prj"]},
        {"finetune_vision_layer": False},
    ],
)
def test_requests_for_nothing_are_refused(checkpoint, asked):
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    with pytest.raises(ArgumentError):
        FastVisionModel.get_peft_model(model, **asked)


@pytest.mark.parametrize(
    "asked", [{"auto_model": object}, {"whisper_task": "transcribe"}, {"fast_inference": True}, {"text_only": True}]
)
def test_features_that_are_not_here(checkpoints, asked):
    with pytest.raises(UnsupportedError, match=next(iter(asked))):
        FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False, **asked)


def test_a_language_model_call_leaves_the_tower_alone(checkpoint):
    """`FastLanguageModel` loads a vision-language model too, and adapts its language layers."""
    model, processor = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model)
    assert kinds(model) == decoder(ATTENTION | MLP) and hasattr(processor, "image_processor")


def test_a_text_model_takes_the_text_path(tmp_path):
    model, tokenizer = FastModel.from_pretrained(make_checkpoint(tmp_path), load_in_4bit=False)
    model = FastModel.get_peft_model(model, finetune_vision_layers=False, r=4)
    assert kinds(model) == {f"model.layers.N.{name}" for name in ATTENTION | MLP}
    assert model.fast_report().num_fused == 2 and not hasattr(tokenizer, "image_processor")


@pytest.mark.parametrize("patch", [True, False])
def test_checkpointing_reaches_every_block(checkpoint, patch, messages):
    """What is not off recomputes the blocks of tower and decoder. Fast blocks follow the model's setting and never
    transformers' own checkpointing, which a trainer switches."""
    model, _ = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, patch=patch)
    blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
    model = FastVisionModel.get_peft_model(model, use_gradient_checkpointing="unsloth")
    assert [block.gradient_checkpointing for block in blocks] == [not patch] * 4
    model = FastVisionModel.for_training(model, use_gradient_checkpointing=False)
    assert not any(block.gradient_checkpointing for block in blocks)
    assert model.training
    model.gradient_checkpointing_enable()
    assert ("is left to the model's own setting" in messages()) == patch


def test_modes_turn_the_padding(checkpoint):
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastVisionModel.get_peft_model(model)
    assert model.training and processor.tokenizer.padding_side == "right"
    FastVisionModel.for_inference(model)
    assert not model.training and processor.tokenizer.padding_side == "left"
