"""Names that scripts import from Unsloth beside its models, and methods that they call on them."""

import pytest

import fastllm
from fastllm import FastLanguageModel
from fastllm._errors import UnsupportedError

from .models.conftest import checkpoint  # noqa: F401


@pytest.mark.parametrize("name", ["PatchDPOTrainer", "PatchKTOTrainer", "PatchFastRL"])
def test_patching_has_nothing_to_do(name, capsys):
    """`from unsloth import PatchDPOTrainer; PatchDPOTrainer()`, in any order with TRL's imports."""
    from trl import DPOConfig

    getattr(fastllm, name)()
    assert f"{name} has nothing to do" in capsys.readouterr().out
    assert DPOConfig(output_dir="x", max_prompt_length=5, bf16=False).output_dir == "x"  # an older keyword


def test_patching_for_an_algorithm():
    fastllm.PatchFastRL("GRPO", FastLanguageModel)


def test_the_collator_is_exported():
    from fastllm.trainer import UnslothVisionDataCollator

    assert fastllm.UnslothVisionDataCollator is UnslothVisionDataCollator


def test_generation_under_vllms_name(checkpoint):  # noqa: F811
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    inputs = tokenizer("the fox", return_tensors="pt")
    answer = model.fast_generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.tolist() == model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist()
    for call in (
        lambda: model.fast_generate("the fox"),
        lambda: model.fast_generate(["the fox"]),
        lambda: model.fast_generate(**inputs, sampling_params=object()),
    ):
        with pytest.raises(UnsupportedError, match=r"vLLM[\s\S]*model.generate"):
            call()


def test_an_adapter_saved_by_the_name_of_the_reasoning_notebooks(checkpoint, tmp_path):  # noqa: F811
    model, _ = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=False)
    FastLanguageModel.get_peft_model(model, r=4).save_lora(tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "lora"), max_seq_length=64, load_in_4bit=False)
    assert again.active_adapters == ["default"]
