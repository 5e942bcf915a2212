"""LLaVA around two decoders, one with fast classes and one without, which runs transformers' own forward: the same
loading, adapters and batches."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Olmo2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastllm import FastVisionModel
from fastllm._errors import UnsupportedError
from fastllm.trainer import UnslothVisionDataCollator
from tests.models.conftest import make_tokenizer
from tests.models.families import on_device_of

from .conftest import TEMPLATE, picture, row

DECODERS = {"llama": LlamaConfig, "olmo2": Olmo2Config}


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request):
    return request.param


@pytest.fixture(scope="module")
def llava(tmp_path_factory, decoder):
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    )  # fmt: skip
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    text = DECODERS[decoder](
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=5, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_it_trains_and_the_report_says_how(llava, decoder, messages):
    model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=False, dtype=torch.float32)
    assert ("'llava with olmo2' has no fast classes yet" in messages()) == (decoder == "olmo2")
    model = FastVisionModel.get_peft_model(model, r=4)
    expected = {"llama": "2 of 2 decoder layers fused", "olmo2": "the model runs transformers' own forward"}
    told = str(model.fast_report())
    assert expected[decoder] in told and ("2 of 2 vision blocks fused" in told) == (decoder == "llama")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("vision_tower" in name for name in trained) and any("language_model" in name for name in trained)
    assert not any("projector" in name for name in trained)

    two = row(3)
    two["messages"][0]["content"].append({"type": "image", "image": picture(4)})
    text = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "fox"}]}
    collate = UnslothVisionDataCollator(model, processor, train_on_responses_only=True)
    assert collate.size.limit == 16
    batch = collate([row(0), two, text])
    assert batch["pixel_values"].shape[0] == 3
    assert (batch["input_ids"] == model.config.image_token_index).sum(1).tolist() == [4, 8, 0]
    model(**on_device_of(model, batch)).loss.backward()
    # The tower's last layer is not read: LLaVA takes the features of the one before.
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all("vision_tower" in name and "layers.1." in name for name in missing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_of_the_last_layer_but_one(llava, checkpointing):
    """What LLaVA reads from its tower is recorded by transformers: loss and gradients as without fast classes."""
    steps = []
    for patch in (True, False):
        model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=False, dtype=torch.float32, patch=patch)
        model = FastVisionModel.get_peft_model(model, r=4, use_gradient_checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        inputs = UnslothVisionDataCollator(model, processor)([row(0), row(1, answer="fox")])
        loss = model(**on_device_of(model, inputs)).loss
        loss.backward()
        steps.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads) = steps
    assert our_grads.keys() == their_grads.keys() and any("vision_tower" in name for name in our_grads)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-3, atol=1e-6)


def test_answers_do_not_depend_on_the_batch(llava):
    model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=False, dtype=torch.float32)
    FastVisionModel.for_inference(model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is in it"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    texts, images = [text, "fox and dog " + text], [picture(8), picture(9)]
    both = processor(images, texts, padding=True, return_tensors="pt")
    together = model.generate(**both, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for index in range(2):
        alone = processor(images[index], texts[index], return_tensors="pt")
        one = model.generate(**alone, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(one[0, -8:], together[index, -8:])


def test_gguf_is_refused_before_anything_is_written(llava, tmp_path):
    model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=False, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"'llava' can't be exported to GGUF[\s\S]*gemma3[\s\S]*qwen2_5_vl"):
        model.export_plan("gguf")
    with pytest.raises(UnsupportedError, match="can't be exported to GGUF"):
        model.save_pretrained_gguf(tmp_path / "gguf", processor)
    assert not list(tmp_path.iterdir())


def test_rows_end_to_end(llava, decoder):
    """With fast classes the rows of a batch may share one; without, that is refused."""
    model, processor = FastVisionModel.from_pretrained(llava, load_in_4bit=False, dtype=torch.float32)
    rows = [row(0), {"messages": row(1)["messages"][1:]}, row(2, answer="fox")]
    if decoder == "olmo2":
        with pytest.raises(UnsupportedError, match="nothing keeps the rows of a batch apart in llava"):
            UnslothVisionDataCollator(model, processor, padding_free=True)
        return
    padded, flat = (UnslothVisionDataCollator(model, processor, padding_free=free)(rows) for free in (False, True))
    assert flat["position_ids"].shape == flat["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    with torch.no_grad():
        got, expected = (float(model(**on_device_of(model, each)).loss) for each in (flat, padded))
    assert got == pytest.approx(expected, rel=1e-6)
