"""`FastLanguageModel`: every argument is honoured or refused by name."""

import inspect

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

import fastllm
from fastllm import FastLanguageModel
from fastllm._errors import ArgumentError, DeviceError, ModelError, TokenizerError, UnsupportedError
from fastllm.models import loader
from fastllm.models.model_methods import PLANNER

from .conftest import make_checkpoint, make_tokenizer

# The arguments of Unsloth's two calls, which scripts pass by name.
LOAD_ARGUMENTS = {
    "model_name",
    "max_seq_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "load_in_16bit",
    "full_finetuning",
    "token",
    "device_map",
    "rope_scaling",
    "fix_tokenizer",
    "trust_remote_code",
    "use_gradient_checkpointing",
    "resize_model_vocab",
    "revision",
    "use_exact_model_name",
    "offload_embedding",
    "float32_mixed_precision",
    "fast_inference",
    "gpu_memory_utilization",
    "float8_kv_cache",
    "random_state",
    "max_lora_rank",
    "disable_log_stats",
    "qat_scheme",
    "load_in_fp8",
    "unsloth_tiled_mlp",
    "text_only",
}
PEFT_ARGUMENTS = {
    "model",
    "r",
    "target_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "layers_to_transform",
    "layers_pattern",
    "use_gradient_checkpointing",
    "random_state",
    "max_seq_length",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "loftq_config",
    "temporary_location",
    "qat_scheme",
    "target_parameters",
    "ensure_weight_tying",
    "finetune_last_n_layers",
}


def test_every_argument_of_the_drop_in_calls_is_there():
    assert set(inspect.signature(FastLanguageModel.from_pretrained).parameters) >= LOAD_ARGUMENTS
    assert set(inspect.signature(FastLanguageModel.get_peft_model).parameters) >= PEFT_ARGUMENTS
    assert next(iter(inspect.signature(FastLanguageModel.from_pretrained).parameters)) == "model_name"


def test_the_five_lines(checkpoint, messages):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, loftq_config=None)
    told = messages()
    assert "NF4" in told and "tokens: bos '<s>'" in told and "trains 16,384" in told
    assert tokenizer.model_max_length == 64 and model.max_seq_length == 64
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.quant_state.nested
    assert "2 of 2 decoder layers fused" in str(model.fast_report())
    FastLanguageModel.for_inference(model)
    assert not model.training and tokenizer.padding_side == "left" and model.config.use_cache
    FastLanguageModel.for_training(model)
    assert model.training and tokenizer.padding_side == "right"


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({"load_in_4bit": True}, "Linear4bit"),
        ({"load_in_8bit": True}, "Linear8bitLt"),
        ({"load_in_16bit": True}, "Linear"),
        ({"load_in_4bit": False}, "Linear"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")}, "Linear4bit"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "Linear4bit"),
    ],
)
def test_how_the_base_is_held(checkpoint, flags, kind):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, **flags)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    model = FastLanguageModel.get_peft_model(model)
    ids = torch.randint(6, 400, (2, 16), device=model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    fused = model.fast_report()
    assert fused.num_fused == (0 if kind == "Linear8bitLt" else 2)
    if kind == "Linear8bitLt":
        assert "int8" in str(fused)


def test_full_finetuning_trains_everything_and_adds_no_adapter(checkpoint, messages):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, full_finetuning=True)
    assert FastLanguageModel.get_peft_model(model) is model
    assert "no adapter is added" in messages()
    ids = torch.randint(6, 400, (2, 16), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.fast_report().num_fused == 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_seq_len": 5}, ArgumentError, "did you mean 'max_seq_length'"),
        ({"load_in_4bits": True}, ArgumentError, "did you mean 'load_in_4bit'"),
        ({"load_in_8bit": True, "load_in_16bit": True}, ArgumentError, "exclude each other"),
        ({"dtype": "float17"}, ArgumentError, "dtype"),
        ({"use_gradient_checkpointing": "sometimes"}, ArgumentError, "use_gradient_checkpointing"),
        ({"fast_inference": True}, UnsupportedError, "vLLM"),
        ({"load_in_fp8": True}, UnsupportedError, "FP8"),
        ({"qat_scheme": "int4"}, UnsupportedError, "quantization-aware"),
        ({"num_labels": 3}, UnsupportedError, "classification"),
        ({"model_name": 7}, ArgumentError, "model_name"),
        ({"model_name": "/no/such/folder"}, ModelError, "no such folder"),
    ],
)
def test_what_can_t_be_served_is_refused_by_name(checkpoint, arguments, error, text):
    with pytest.raises(error, match=text):
        FastLanguageModel.from_pretrained(**{"model_name": checkpoint, **arguments})


def test_errors_are_also_the_builtin_kind():
    for error, builtin in (
        (ArgumentError, TypeError), (ModelError, ValueError), (UnsupportedError, NotImplementedError),
        (DeviceError, RuntimeError),
    ):  # fmt: skip
        assert issubclass(error, builtin)


def test_an_unknown_architecture_loads_with_a_notice_or_raises(tmp_path, messages):
    folder = make_checkpoint(
        tmp_path, config_class=GPT2Config, model_class=GPT2LMHeadModel, n_embd=64, n_layer=2, n_head=4, n_positions=128
    )
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128, load_in_4bit=False)
    assert "'gpt2' has no fast classes yet" in messages()
    assert "transformers' own forward" in str(model.fast_report())
    model = FastLanguageModel.get_peft_model(model, target_modules=["c_attn"])
    ids = torch.randint(6, 400, (2, 16), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ModelError, match="strict=True"):
        FastLanguageModel.from_pretrained(folder, max_seq_length=128, load_in_4bit=False, strict=True)
    with pytest.raises(ModelError, match="max_seq_length=128"):
        FastLanguageModel.from_pretrained(folder, max_seq_length=512, load_in_4bit=False)


def test_patch_false_leaves_transformers_alone(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False, patch=False)
    assert type(model.model.layers[0]).__module__.startswith("transformers.")


def test_a_model_that_is_no_language_model(tmp_path):
    BertForMaskedLM(
        BertConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    # transformers has a causal BERT
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), max_seq_length=None, load_in_4bit=False)
    assert "own forward" in str(model.fast_report())


def test_rope_is_scaled_past_the_native_length(checkpoint, messages):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=256, load_in_4bit=False)
    assert "RoPE positions are divided by 2" in messages()
    assert model.config.rope_parameters["factor"] == 2.0 and model.config.max_position_embeddings == 256
    short, _ = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=128, load_in_4bit=False)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq * 2, short.model.rotary_emb.inv_freq)
    given, _ = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=512, load_in_4bit=False, rope_scaling={"type": "linear", "factor": 4.0}
    )
    assert given.config.rope_parameters["factor"] == 4.0
    everything, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=None, load_in_4bit=False)
    assert everything.max_seq_length == tokenizer.model_max_length == 128


def test_the_default_length_gives_way_to_a_shorter_native_one(checkpoint, messages):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    assert model.max_seq_length == tokenizer.model_max_length == model.config.max_position_embeddings < 2048
    assert "past the native" not in messages()


def test_dtype_is_the_machine_s(checkpoint, messages):
    from fastllm._device import Device

    t4 = Device("cuda", 0, "Tesla T4", (7, 5), 16 * 2**30, False, False)
    a100 = Device("cuda", 0, "A100", (8, 0), 80 * 2**30, True, True)
    request = loader.LoadRequest(checkpoint, bits=4)
    plan = loader.plan_precision(request, object(), t4)
    assert plan.dtype is torch.float16 and plan.quantization.bnb_4bit_compute_dtype is torch.float16
    assert loader.plan_precision(request, object(), a100).dtype is torch.bfloat16
    asked = loader.LoadRequest(checkpoint, dtype=torch.bfloat16)
    assert loader.plan_precision(asked, object(), t4).dtype is torch.float16
    assert "no native bf16" in messages()


@pytest.mark.parametrize("dtype", [None, torch.float16, "bfloat16"])
def test_dtype_as_asked(checkpoint, dtype):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, dtype=dtype, load_in_4bit=False)
    of_the_machine = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    expected = {None: of_the_machine, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert model.dtype is expected


def test_adapters_are_reloaded_with_their_base(checkpoint, tmp_path, messages):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, random_state=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert "with adapter" in messages() and again.fast_report().num_fused == 2
    trained = {name: p for name, p in again.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(trained[name], parameter)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "down_proj"],
        "['q_proj', 'down_proj']",
        r".*\.(q_proj|down_proj)",
        "all-linear",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ],
    ids=str,
)
def test_target_modules(checkpoint, targets):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2, target_modules=targets)
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A." in name
    }
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted == (everything if targets == "all-linear" or len(targets) == 7 else {"q_proj", "down_proj"})
    assert model.fast_report().num_fused == 2


def test_targets_that_a_model_holds_as_one_matrix(tmp_path, messages):
    """Phi-3: the default targets are found in the merged matrices; a part of one is not there to be had."""
    checkpoint = make_checkpoint(tmp_path, config_class=Phi3Config, model_class=Phi3ForCausalLM)
    model, _ = FastLanguageModel.from_pretrained(checkpoint)
    with pytest.raises(ArgumentError, match=r"q_proj.*qkv_proj"):
        FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "down_proj"])
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert "its LoRA goes on qkv_proj" in messages()
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 2 * 4
    assert model.fast_report().num_fused == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target_modules": ["q_porj"]}, "did you mean 'q_proj'"),
        ({"target_modules": "['q_proj', "}, "looks like a list"),
        ({"r": 0}, "positive whole number"),
        ({"lora_alfa": 3}, "did you mean 'lora_alpha'"),
        ({"modules_to_save": ["lm_heads"]}, "did you mean 'lm_head'"),
        ({"finetune_last_n_layers": 9}, "use 1 to 2"),
        ({"init_lora_weights": "loftq"}, "load_in_4bit=False"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_adapter_mistakes_are_named(checkpoint, arguments, text):
    model, _ = FastLanguageModel.from_pretrained(checkpoint)
    with pytest.raises(ArgumentError, match=text):
        FastLanguageModel.get_peft_model(model, **arguments)


def test_embeddings_named_as_targets_are_trained_in_full(checkpoint, messages):
    model, _ = FastLanguageModel.from_pretrained(checkpoint)
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert "trained in full" in messages()
    full = {name: p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert {p.dtype for p in full.values()} == {torch.float32} and len(full) == 2
    ids = torch.randint(6, 400, (2, 16), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in full.values())


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_4bit": False}], ids=["nf4", "16-bit"])
@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=["embeddings_and_head", "head", "bias"],
)
def test_a_16_bit_model_with_fp32_parts_answers_outside_autocast(checkpoint, bits, options):
    """As in continued pretraining, where embeddings and head are trained in full and a text is completed afterwards."""
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, dtype=torch.bfloat16, **bits)
    model = FastLanguageModel.get_peft_model(model, **options)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = tokenizer("the quick brown fox", return_tensors="pt").to(model.device)
    with torch.no_grad():
        outside = model.eval()(**inputs).logits
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            assert torch.equal(outside, model(**inputs).logits)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    expected = torch.nn.functional.cross_entropy(outside[0, :-1].float(), inputs["input_ids"][0, 1:])
    assert abs(float(loss) - float(expected)) < 0.02
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_last_layers_only_and_seeds(checkpoint):
    first, second = (
        FastLanguageModel.get_peft_model(
            FastLanguageModel.from_pretrained(checkpoint)[0], finetune_last_n_layers=1, random_state=11
        )
        for _ in range(2)
    )
    names = [name for name, p in first.named_parameters() if p.requires_grad]
    assert names and all(".layers.1." in name for name in names)
    for (_, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_asking_twice(checkpoint, messages):
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(checkpoint)[0], r=4)
    assert FastLanguageModel.get_peft_model(model, r=4) is model
    with pytest.raises(ArgumentError, match="r is 4, asked for 8"):
        FastLanguageModel.get_peft_model(model, r=8)


def test_loftq_and_other_initialisations(checkpoint):
    pytest.importorskip("scipy")
    model, _ = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    lora_b = next(p for name, p in model.named_parameters() if "lora_B" in name)
    assert lora_b.abs().sum() > 0  # LoftQ starts from the quantisation error, not from zero


def test_checkpointing_setting_reaches_the_planner(checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, use_gradient_checkpointing="unsloth")
    assert getattr(model, PLANNER).setting == "fastllm"
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=False)
    assert getattr(model.get_base_model(), PLANNER).setting is False
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert getattr(model.get_base_model(), PLANNER).setting is True


def test_a_tokenizer_that_is_too_large(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(400)])
    folder = make_checkpoint(tmp_path, tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match=r"resize_model_vocab=\d+"):
        FastLanguageModel.from_pretrained(folder)
    model, tokenizer = FastLanguageModel.from_pretrained(folder, resize_model_vocab=len(tokenizer), load_in_4bit=False)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.parametrize(
    ("special", "pad", "told"),
    [
        ({"pad_token": None}, "<pad>", "since there was none"),
        ({"pad_token": "<|im_end|>"}, "<pad>", "since '<|im_end|>' ends answers"),
        ({}, "<pad>", "the tokenizer's own"),
    ],
)
def test_padding_never_ends_an_answer(tmp_path, messages, special, pad, told):
    folder = make_checkpoint(tmp_path, tokenizer=make_tokenizer(**special))
    model, tokenizer = FastLanguageModel.from_pretrained(folder)
    assert tokenizer.pad_token == pad and told in messages()
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    _, tokenizer = FastLanguageModel.from_pretrained(folder, fix_tokenizer=False)
    assert tokenizer.pad_token == special.get("pad_token", "<pad>")


def test_for_inference_wants_the_model(checkpoint):
    _, tokenizer = FastLanguageModel.from_pretrained(checkpoint)
    with pytest.raises(ArgumentError, match="pass the model"):
        FastLanguageModel.for_inference(tokenizer)


def test_public_names_and_a_mistyped_one():
    assert fastllm.is_bf16_supported() in (True, False)
    with pytest.raises(AttributeError, match="FastLanguageModel"):
        _ = fastllm.FastLanguageModle
