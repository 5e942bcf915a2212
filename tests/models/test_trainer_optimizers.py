"""Trainers with `optim="adamw_8bit"` get fastllm's AdamW, which updates small tensors together: the same training."""

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments
from fastllm.models import optimizers

ROWS = Dataset.from_list([{"text": f"the fox number {i} jumps over dog {i * 3 % 7}"} for i in range(24)])
CONFIG = {"max_steps": 4, "save_steps": 2, "report_to": "none", "learning_rate": 1e-2, "optim": "adamw_8bit"}


@pytest.fixture
def make_trainer(checkpoint, tmp_path):
    """A trainer of adapters of 4,096 values and more: smaller ones have 32-bit states."""

    def make(folder="out", *, trainer=SFTTrainer, config=SFTConfig, modules=("q_proj", "up_proj"), **options):
        settings = {**CONFIG, **{name: options.pop(name) for name in list(options) if hasattr(config, name)}}
        settings |= options.pop("settings", {})
        model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=64, target_modules=list(modules))
        return trainer(
            model=model, args=config(output_dir=str(tmp_path / folder), **settings), train_dataset=ROWS,
            processing_class=tokenizer, **options,
        )  # fmt: skip

    return make


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def adapters(trainer):
    return [p for p in trainer.model.parameters() if p.requires_grad]


def assert_same_bits(one, other):
    assert all(torch.equal(a, b) for a, b in zip(adapters(one), adapters(other), strict=True))
    for a, b in zip(adapters(one), adapters(other), strict=True):
        states = optimizer_of(one).state[a], optimizer_of(other).state[b]
        assert torch.equal(states[0]["state1"], states[1]["state1"]) and states[0]["step"] == states[1]["step"]


@pytest.fixture
def theirs(make_trainer):
    """A training with bitsandbytes' own class, which a user asks for by name."""
    own = (bitsandbytes.optim.AdamW, {"lr": 1e-2, "optim_bits": 8})
    trainer = make_trainer("theirs", optimizer_cls_and_kwargs=own)
    trainer.train()
    assert type(optimizer_of(trainer)) is bitsandbytes.optim.AdamW
    return trainer


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_bnb_8bit"])
def test_the_same_training(make_trainer, theirs, messages, name):
    ours = make_trainer(optim=name)
    ours.train()
    assert isinstance(optimizer_of(ours), optimizers.AdamW) and optimizer_of(ours)._places
    assert "8-bit AdamW updates small tensors together" in messages()
    assert_same_bits(ours, theirs)


def test_training_resumes_from_a_checkpoint_of_either(make_trainer, theirs):
    ours = make_trainer()
    ours.train(resume_from_checkpoint=f"{theirs.args.output_dir}/checkpoint-2")
    assert isinstance(optimizer_of(ours), optimizers.AdamW)
    assert_same_bits(ours, theirs)
    back = make_trainer("back", optimizer_cls_and_kwargs=(bitsandbytes.optim.AdamW, {"lr": 1e-2, "optim_bits": 8}))
    make_trainer("again").train()
    back.train(resume_from_checkpoint=f"{back.args.output_dir}/../again/checkpoint-2")
    assert_same_bits(back, theirs)


def test_training_on_with_the_same_trainer(make_trainer):
    trainer = make_trainer()
    trainer.train()
    first = optimizer_of(trainer)
    trainer.args.max_steps = 6
    trainer.train()
    assert optimizer_of(trainer) is first and isinstance(first, optimizers.AdamW)


def test_an_optimizer_that_the_user_made_stays(make_trainer, messages):
    trainer = make_trainer()
    own = bitsandbytes.optim.AdamW8bit(adapters(trainer), lr=1e-2)
    trainer = SFTTrainer(
        model=trainer.model, args=trainer.args, train_dataset=ROWS, processing_class=trainer.processing_class,
        optimizers=(own, None),
    )  # fmt: skip
    trainer.train()
    assert optimizer_of(trainer) is own and type(own) is bitsandbytes.optim.AdamW8bit
    assert "AdamW" not in messages()


@pytest.mark.parametrize("name", ["adamw_torch", "paged_adamw_8bit", "lion_8bit"])
def test_other_optimizers_stay(make_trainer, name, messages):
    trainer = make_trainer(optim=name)
    made = trainer.create_optimizer()
    assert not type(made).__module__.startswith("fastllm") and "AdamW" not in messages()


def test_embeddings_with_a_rate_of_their_own(make_trainer):
    """Embeddings have 32-bit states, which transformers asks for, in a group that fastllm's trainer makes."""
    trainer = make_trainer(
        trainer=UnslothTrainer, config=UnslothTrainingArguments, modules=("q_proj", "embed_tokens"),
        settings={"embedding_learning_rate": 1e-5},
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    optimizer = optimizer_of(trainer)
    assert isinstance(optimizer, optimizers.AdamW)
    by_rate = {group["initial_lr"]: group["params"] for group in optimizer.param_groups if group["params"]}
    (embedding,) = by_rate[1e-5]
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in by_rate[1e-2])
