"""`save_method="lora"`: a plain PEFT folder, which PEFT and fastllm load."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

from .checkpoints import adapted, disturb, divergence, load, plain, tensors_of

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}])
def test_peft_and_fastllm_load_it(base_of, tmp_path, options):
    model, tokenizer = adapted(base_of("llama"), **options)
    folder = model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    files = {path.name for path in folder.iterdir()}
    assert files >= ADAPTER_FILES
    assert not any(name.startswith("model") or name == "config.json" for name in files)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert divergence(model, by_peft) < 1e-8
    again, _ = load(folder)
    assert divergence(model, again) < 1e-8


def test_its_files_are_those_of_peft(base_of, tmp_path):
    """The same tensors and settings as `model.save_pretrained` of PEFT writes."""
    from safetensors.torch import load_file

    model, tokenizer = adapted(base_of("qwen2"), use_rslora=True)
    ours = model.save_pretrained_merged(tmp_path / "ours", tokenizer, save_method="lora")
    model.save_pretrained(tmp_path / "peft")
    got, expected = (load_file(folder / "adapter_model.safetensors") for folder in (ours, tmp_path / "peft"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    got, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, tmp_path / "peft"))
    for settings in (got, expected):  # PEFT writes a set, in an order that differs from run to run
        settings["target_modules"].sort()
    assert got == expected


def test_several_adapters(base_of, tmp_path):
    base = base_of("llama")
    model, tokenizer = adapted(base, target_modules=["q_proj", "up_proj"])
    model.add_adapter("style", model.peft_config["default"])
    model.set_adapter("style")
    disturb(model, seed=4)
    model.base_model.set_adapter(["default", "style"])
    folder = model.save_pretrained_merged(tmp_path / "adapters", tokenizer, save_method="lora")
    twin = PeftModel.from_pretrained(plain(base)[0], folder)
    twin.load_adapter(folder / "style", "style")
    twin.base_model.set_adapter(["default", "style"])
    assert divergence(model, twin) < 1e-8


def test_a_base_without_adapters_has_nothing_to_save(base_of, tmp_path):
    model, tokenizer = load(base_of("llama"))
    with pytest.raises(ValueError, match=r"no active adapter[\s\S]*merged_16bit"):
        model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    assert not (tmp_path / "adapter").exists()


def test_a_folder_that_was_loaded_again_merges_to_the_same_model(base_of, tmp_path):
    """Train, save the adapter, and merge on another day."""
    model, tokenizer = adapted(base_of("qwen3"), bits=4, use_rslora=True)
    today = model.save_pretrained_merged(tmp_path / "today", tokenizer)
    folder = model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    again, tokenizer = load(folder, bits=4)
    later = again.save_pretrained_merged(tmp_path / "later", tokenizer)
    one, other = tensors_of(today), tensors_of(later)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
