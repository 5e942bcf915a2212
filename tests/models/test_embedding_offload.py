"""`offload_embedding=True`: the input embedding stays in host memory, wherever the model computes."""

import copy

import pytest
import torch

from fastllm import FastLanguageModel
from fastllm._errors import ArgumentError
from fastllm.models import embedding_offload
from fastllm.models.embedding_offload import device_of, is_offloaded

from .families import FAMILIES, batch, build


@pytest.fixture
def offloaded(monkeypatch):
    """A model whose embedding is in host memory although that is where the model computes."""
    monkeypatch.setattr(embedding_offload, "_reason_to_stay", lambda *_: None)
    model = build(FAMILIES["llama"])
    embedding_offload.offload_embedding(model)
    return model


def test_it_reads_the_same_rows(offloaded):
    plain = build(FAMILIES["llama"])
    inputs = batch(plain.config)
    assert is_offloaded(offloaded.get_input_embeddings())
    assert torch.equal(offloaded(**inputs).logits, plain(**inputs).logits)
    assert offloaded.state_dict().keys() == plain.state_dict().keys()
    assert type(offloaded.get_input_embeddings()).__name__ == "Embedding"
    assert torch.equal(copy.deepcopy(offloaded)(**inputs).logits, plain(**inputs).logits)


def test_moving_the_model_leaves_it(offloaded):
    """Its dtype follows, its place does not; the model is said to be where the rest of it is."""
    embedding = offloaded.get_input_embeddings()
    offloaded.to(torch.float64)
    assert embedding.weight.dtype == torch.float64 and is_offloaded(embedding)
    for part in (offloaded.model.layers, offloaded.model.norm, offloaded.lm_head):
        part.to("meta")
    assert device_of(offloaded).type == "meta" and embedding.weight.device.type == "cpu"


def test_its_table_goes_nowhere_meanwhile(offloaded):
    """A trainer moves the model to the GPU; a table that went along would take its memory for a moment."""
    embedding, seen = offloaded.get_input_embeddings(), []

    def move(tensor):
        seen.append(tensor.numel())
        return tensor.clone()

    before = embedding.weight.data_ptr()
    embedding._apply(move)
    assert embedding.weight.data_ptr() == before and seen == [0]


def test_families_do_to_its_rows_what_they_do(monkeypatch):
    """Gemma scales them."""
    monkeypatch.setattr(embedding_offload, "_reason_to_stay", lambda *_: None)
    model, plain = (build(FAMILIES["gemma3_text"]) for _ in range(2))
    embedding_offload.offload_embedding(model)
    ids = batch(plain.config)["input_ids"]
    assert torch.equal(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))


def test_where_it_stays(checkpoint, tied_checkpoint, messages):
    for folder, reason in ((checkpoint, "the model is in host memory already"), (tied_checkpoint, "it is the head")):
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=64, load_in_4bit=False, offload_embedding=True, device_map={"": "cpu"}
        )
        assert f"offload_embedding=True is left out: {reason}" in messages()
        assert not is_offloaded(model.get_input_embeddings())


def test_it_is_not_trained(offloaded):
    with pytest.raises(ArgumentError, match=r"embed_tokens is in host memory[\s\S]*offload_embedding=False"):
        FastLanguageModel.get_peft_model(offloaded, r=4, target_modules=["q_proj", "embed_tokens"])


@pytest.mark.gpu
def test_on_a_gpu(checkpoint):
    """Training and generation give what they give with the embedding on the GPU."""
    results = []
    for offload in (True, False):
        model, tokenizer = FastLanguageModel.from_pretrained(
            checkpoint, max_seq_length=64, load_in_4bit=False, offload_embedding=offload
        )
        model = FastLanguageModel.get_peft_model(model, r=4)
        embedding = model.get_input_embeddings()
        assert embedding.weight.device.type == ("cpu" if offload else "cuda") and model.device.type == "cuda"
        inputs = tokenizer("the quick brown fox", return_tensors="pt").to(model.device)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        answer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        results.append((loss.detach(), gradients, answer))
    (loss, gradients, answer), (expected_loss, expected_gradients, expected_answer) = results
    assert torch.equal(loss, expected_loss) and torch.equal(answer, expected_answer)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))
