"""Small micro-batches of gradient accumulation run merged: fewer forwards, the same optimiser steps."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.models import micro_batches
from fastllm.trainer import FastTrainer, FastTrainingArguments

# 21 rows: 5 steps of 4 in an epoch, and one of 1.
ROWS = [{"text": "the fox asks why " * (1 + i % 5) + str(i)} for i in range(21)]
CONFIG = {
    "num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 1,
    "report_to": "none", "learning_rate": 1e-2, "save_strategy": "no", "bf16": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def launches_take_the_time(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(micro_batches, "_ENOUGH_TOKENS", {"cpu": 4096, "cuda": 4096})


@pytest.fixture
def make_trainer(checkpoint, tmp_path):
    def make(rows=ROWS, *, adapter=None, trainer=SFTTrainer, config=SFTConfig, **options):
        settings = {**CONFIG, **{name: options.pop(name) for name in list(options) if hasattr(config, name)}}
        model, tokenizer = FastLanguageModel.from_pretrained(
            checkpoint, max_seq_length=64, load_in_4bit=False, **options
        )
        model = FastLanguageModel.get_peft_model(model, r=4, **(adapter or {}))
        rows = rows if not isinstance(rows, list) else Dataset.from_list(rows)
        args = config(output_dir=str(tmp_path), **settings)
        return trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)

    return make


def batching(trainer) -> tuple[int, int]:
    return trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps


def test_the_optimiser_steps_are_the_same(make_trainer, messages):
    """Losses, gradient norms and trained adapters, over epochs that end in a smaller step."""
    merged, apart = make_trainer(), make_trainer(merge_micro_batches=False)
    assert batching(merged) == (4, 1) and batching(apart) == (1, 4)
    assert "4 micro-batches of 1 run as one of 4" in messages()
    forwards = []
    for trainer in (merged, apart):
        calls = [0]
        trainer.model.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        trainer.train()
        forwards.append(calls[0])
    assert forwards == [12, 42]
    assert merged.state.global_step == apart.state.global_step == 12
    assert merged.state.epoch == apart.state.epoch == 2
    for name, tolerance in (("loss", 1e-3), ("grad_norm", 1e-3), ("num_tokens", 0)):
        found, expected = ([e[name] for e in t.state.log_history if "loss" in e] for t in (merged, apart))
        assert len(found) == 12 and found == pytest.approx(expected, rel=tolerance), name
    for (name, a), (_, b) in zip(merged.model.named_parameters(), apart.model.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


def test_only_as_many_as_the_rows_lengths_allow(make_trainer, monkeypatch):
    long = [{"text": "why the fox jumps " * 30} for _ in range(8)]  # cut to 64 tokens
    for enough, expected in ((128, (2, 2)), (100, (1, 4))):
        monkeypatch.setattr(micro_batches, "_ENOUGH_TOKENS", {"cpu": enough, "cuda": enough})
        assert batching(make_trainer(long)) == expected


def test_only_as_many_as_memory_has_room_for(make_trainer, monkeypatch):
    trainer = make_trainer(merge_micro_batches=False)
    base = trainer.model.get_base_model()
    free = 2**34
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: free)
    most = micro_batches._tokens_in_memory(base)
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: free // 2)
    assert micro_batches._tokens_in_memory(base) == pytest.approx(most / 2, rel=1e-3)
    monkeypatch.setattr(micro_batches, "free_bytes", lambda device: 0)
    assert batching(make_trainer()) == (1, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": {"lora_dropout": 0.1}},  # other rows would get other masks
        {"adapter": {"use_gradient_checkpointing": "offload"}},  # memory was asked for
        {"adapter": {"use_gradient_checkpointing": False}},
        {"dataloader_drop_last": True},  # would drop more
        {"gradient_accumulation_steps": 1},
        {"patch": False},
    ],
)
def test_left_apart(make_trainer, options):
    trainer = make_trainer(**options)
    assert batching(trainer) == (1, options.get("gradient_accumulation_steps", 4))


def test_streams_are_left_apart(make_trainer):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    assert batching(make_trainer(stream, max_steps=2)) == (1, 4)


def test_fastllms_own_trainer(make_trainer):
    trainer = make_trainer(trainer=FastTrainer, config=FastTrainingArguments)
    assert batching(trainer) == (4, 1)
