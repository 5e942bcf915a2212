"""Merged saving of a vision-language model: plain transformers loads the folder and answers as the trained model."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fastllm import FastVisionModel

from .conftest import picture


@pytest.fixture
def trained(checkpoint):
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=torch.float32)
    model = FastVisionModel.get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return FastVisionModel.for_inference(model), processor


def logits(model, processor):
    text = "<|vision_start|><|image_pad|><|vision_end|>what is in it"
    with torch.no_grad():
        inputs = processor(picture(), text, add_special_tokens=False, return_tensors="pt").to(model.device)
        return model(**inputs).logits


def test_the_merged_folder_sees_as_the_trained_model(trained, tmp_path):
    """Adapters of the tower are merged as well as those of the decoder."""
    model, processor = trained
    folder = model.save_pretrained_merged(tmp_path / "merged", processor)
    merged = AutoModelForImageTextToText.from_pretrained(folder).to(model.device).eval()
    expected = logits(model, processor)
    torch.testing.assert_close(logits(merged, processor), expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model, processor) - expected).norm() > 0.05 * expected.norm()
    assert (folder / "processor_config.json").is_file() and (folder / "chat_template.jinja").is_file()
    again, processor = FastVisionModel.from_pretrained(str(folder), load_in_4bit=False, dtype=torch.float32)
    torch.testing.assert_close(logits(again.eval(), processor), expected, rtol=1e-4, atol=1e-5)
    assert type(processor).__name__.startswith("Qwen2")


def test_merged_4bit(trained, tmp_path):
    model, processor = trained
    folder = model.save_pretrained_merged(tmp_path / "merged4", processor, save_method="merged_4bit")
    again, processor = FastVisionModel.from_pretrained(str(folder))
    packed = {name for name, module in again.named_modules() if type(module).__name__ == "Linear4bit"}
    assert packed and all(name.startswith("model.language_model.") for name in packed), packed
    expected = logits(model, processor)
    assert (logits(again.eval(), processor) - expected).norm() < 0.2 * expected.norm()
