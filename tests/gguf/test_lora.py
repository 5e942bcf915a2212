"""A LoRA adapter as a GGUF file: on the base file, llama.cpp computes what PEFT computes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from fastllm._errors import UnsupportedError
from fastllm.gguf import GGUFReader, export_gguf, write_lora_gguf
from fastllm.gguf.container import GGUFError

from . import models

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = [[17], [5, 301, 44, 250, 7, 99], list(range(40, 70))]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return models.save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def adapted(family: str, **settings):
    """(base model with its adapter, adapter configuration, adapter tensors), both factors random."""
    model = models.tiny_model(family)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION_AND_MLP} | settings
    peft_model = get_peft_model(model, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return peft_model, peft_model.peft_config["default"].to_dict(), get_peft_model_state_dict(peft_model)


def divergence(judge, peft_model, tokenizer_dir, tmp_path, **options) -> float:
    """Largest KL(PEFT || llama.cpp on base file and adapter file); the adapter must matter."""
    base = peft_model.get_base_model()
    plain = {name.replace(".base_layer", ""): p for name, p in base.named_parameters() if "lora_" not in name}
    config = base.config.to_dict()
    export_gguf({tmp_path / "base.gguf": "f32"}, config=config, tokenizer_dir=tokenizer_dir, tensors=plain.items())
    write_lora_gguf(tmp_path / "lora.gguf", config=config, **options)
    with judge.loaded(tmp_path / "base.gguf", models.VOCAB_SIZE, lora=tmp_path / "lora.gguf") as loaded:
        found, without_it = [], []
        for ids in PROMPTS:
            expected, got = models.logprobs(peft_model, ids), torch.from_numpy(loaded.next_token_logprobs(ids)).double()
            with peft_model.disable_adapter():
                without_it.append(float((expected.exp() * (expected - models.logprobs(peft_model, ids))).sum()))
            found.append(float((expected.exp() * (expected - got)).sum()))
    assert max(without_it) > 1e-3
    return max(found)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama, tied, llama3 rope", {"target_modules": ["q_proj", "k_proj"]}),
        ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"q_proj": 48, "layers.1.mlp.down_proj": 4}, "rank_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": [*ATTENTION_AND_MLP, "lm_head"]}),
        ("qwen2", {}),
        ("gemma2", {}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    ],
)
def test_base_and_adapter_files_are_the_adapted_model(judge, tokenizer_dir, tmp_path, family, settings):
    peft_model, adapter_config, tensors = adapted(family, **settings)
    options = {"adapter_config": adapter_config, "tensors": tensors.items(), "quantization": "f32"}
    assert divergence(judge, peft_model, tokenizer_dir, tmp_path, **options) < 1e-5


def test_a_16_bit_adapter(judge, tokenizer_dir, tmp_path):
    peft_model, adapter_config, tensors = adapted("llama")
    options = {"adapter_config": adapter_config, "tensors": tensors.items()}
    assert divergence(judge, peft_model, tokenizer_dir, tmp_path, **options) < 1e-4
    with GGUFReader(tmp_path / "lora.gguf") as reader:
        assert reader.metadata["general.type"] == "adapter"
        assert {info.type.name for info in reader.tensors.values()} == {"F16"}


def test_factors_whose_rows_are_short_stay_16_bit(tmp_path):
    _, adapter_config, tensors = adapted("llama")
    config = models.tiny_model("llama").config.to_dict()
    path = tmp_path / "a.gguf"
    write_lora_gguf(path, config=config, adapter_config=adapter_config, tensors=tensors.items(), quantization="q8_0")
    with GGUFReader(path) as reader:
        assert reader.tensors["blk.0.attn_q.weight.lora_a"].type.name == "Q8_0"
        assert reader.tensors["blk.0.attn_q.weight.lora_b"].type.name == "F16"  # rows of r = 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "lora_only"}, "biases"),
        ({"target_modules": ["embed_tokens"]}, "not a LoRA factor of a linear layer"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "not a module name"),
    ],
)
def test_what_such_a_file_cannot_say_is_refused(tmp_path, settings, message):
    _, adapter_config, tensors = adapted("llama", **settings)
    config = models.tiny_model("llama").config.to_dict()
    with pytest.raises(UnsupportedError, match=message) as caught:
        write_lora_gguf(tmp_path / "a.gguf", config=config, adapter_config=adapter_config, tensors=tensors.items())
    assert "merged_16bit" in str(caught.value) or "alpha_pattern" in message
    assert list(tmp_path.iterdir()) == []


def test_factors_that_do_not_fit_are_refused(tmp_path):
    _, adapter_config, tensors = adapted("llama")
    config = models.tiny_model("llama").config.to_dict()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    for broken, error in (
        ({}, GGUFError),
        ({name: tensors[name]}, GGUFError),
        (tensors | {name: tensors[name][:, :7]}, GGUFError),
        (tensors | {name: tensors[name][:3]}, GGUFError),
        (tensors | {name.replace("up_proj", "up_projj"): tensors[name]}, GGUFError),
        (tensors | {"base_model.model.extra": tensors[name]}, UnsupportedError),
    ):
        with pytest.raises(error):
            write_lora_gguf(tmp_path / "a.gguf", config=config, adapter_config=adapter_config, tensors=broken.items())
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_tied_head_is_refused(tmp_path):
    """The head is the embedding then, and a file can't adapt one of them."""
    _, adapter_config, tensors = adapted("llama", target_modules=["lm_head"])
    config = models.tiny_model("llama").config.to_dict() | {"tie_word_embeddings": True}
    with pytest.raises(UnsupportedError, match=r"no place for 'lm_head'"):
        write_lora_gguf(tmp_path / "a.gguf", config=config, adapter_config=adapter_config, tensors=tensors.items())
