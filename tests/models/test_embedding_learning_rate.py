"""Embeddings and head with a learning rate of their own."""

import pytest
import torch
from datasets import Dataset

from fastllm import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments, unsloth_train
from fastllm._errors import UnsupportedError

ROWS = Dataset.from_list([{"text": "the quick brown fox jumps over the lazy dog"}] * 8)
CONFIG = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "learning_rate": 1e-3}


def trainer_of(model, tokenizer, folder, **settings):
    return UnslothTrainer(
        model=model, tokenizer=tokenizer, train_dataset=ROWS,
        args=UnslothTrainingArguments(output_dir=str(folder), **CONFIG, **settings),
    )  # fmt: skip


def rates_of(trainer):
    """{name of a trained tensor: its learning rate at the start}"""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]
    }  # fmt: skip


def test_under_lora(checkpoint, messages, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "embed_tokens", "lm_head"])
    trainer = trainer_of(model, tokenizer, tmp_path, embedding_learning_rate=1e-5)
    unsloth_train(trainer)
    rates = rates_of(trainer)
    assert len(rates) == sum(p.requires_grad for p in model.parameters())
    for name, rate in rates.items():
        assert rate == (1e-5 if "modules_to_save" in name else 1e-3)
    assert "2 embedding and head tensors are trained at 1e-05" in messages()


def test_in_full_fine_tuning(checkpoint, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, full_finetuning=True, dtype=torch.float32)
    trainer = trainer_of(model, tokenizer, tmp_path, embedding_learning_rate=1e-5)
    trainer.train()
    slow = {name for name, rate in rates_of(trainer).items() if rate == 1e-5}
    assert slow == {"model.embed_tokens.weight", "lm_head.weight"}


def test_without_effect_it_is_told(checkpoint, messages, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint)
    trainer = trainer_of(FastLanguageModel.get_peft_model(model), tokenizer, tmp_path, embedding_learning_rate=1e-5)
    trainer.train()
    assert set(rates_of(trainer).values()) == {1e-3}
    assert "neither the embedding nor the head is trained" in messages()


def test_q_galore_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="Q-GaLore"):
        UnslothTrainingArguments(output_dir=str(tmp_path), q_galore_config={"rank": 256})
