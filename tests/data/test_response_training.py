"""A fast model trained on answers only: the loss is that of the answers, also on eval data and after resuming."""

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from fastllm.data import load_chat_data

from .conftest import make_small_model

ROWS = [
    {"conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": f"It is {i} and {i}."}]}
    for i in range(12)
]
ANSWERS = [f"It is {i} and {i}.<|im_end|>" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_model(tmp_path_factory.mktemp("model"))


def make_trainer(folder, output, **config) -> SFTTrainer:
    """The notebook's path: ShareGPT rows, standardised, rendered to a text column, then masked."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=8, random_state=3407)
    tokenizer = get_chat_template(tokenizer, "chatml")
    data = standardize_sharegpt(Dataset.from_list(ROWS)).map(
        lambda rows: {"text": [tokenizer.apply_chat_template(c, tokenize=False) for c in rows["conversations"]]},
        batched=True,
    )
    settings = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 4, "save_steps": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "seed": 3407,
    }  # fmt: skip
    trainer = SFTTrainer(
        model, args=SFTConfig(**{**settings, **config}), processing_class=tokenizer,
        train_dataset=data.select(range(8)), eval_dataset={"unseen": data.select(range(8, 12))},
    )  # fmt: skip
    return train_on_responses_only(trainer)


def trained_text(trainer: SFTTrainer, data: Dataset) -> list[str]:
    decode = trainer.processing_class.decode
    return [decode([token for token in row if token != -100]) for row in data["labels"]]


def answer_loss(trainer: SFTTrainer, data: Dataset) -> float:
    """Mean cross entropy of the answers' tokens, from the logits of each row by itself."""
    losses, answered = [], 0
    for row in data:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = trainer.model(input_ids=ids[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        answered += (labels[1:] != -100).sum().item()
    return torch.stack(losses).sum().item() / answered


def test_the_loss_is_that_of_the_answers(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, per_device_eval_batch_size=4)
    unseen = trainer.eval_dataset["unseen"]
    assert trained_text(trainer, trainer.train_dataset) == ANSWERS[:8]
    assert trained_text(trainer, unseen) == ANSWERS[8:]
    trainer.train()
    expected = answer_loss(trainer, unseen)
    assert trainer.evaluate()["eval_unseen_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_ends_where_the_whole_run_ends(folder, tmp_path):
    whole = make_trainer(folder, tmp_path)
    whole.train()
    resumed = make_trainer(folder, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.evaluate()["eval_unseen_loss"] == whole.evaluate()["eval_unseen_loss"]
    expected = {name: weight for name, weight in whole.model.named_parameters() if weight.requires_grad}
    for name, weight in resumed.model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, expected[name]), name


def test_loaded_messages_go_straight_into_a_trainer(folder, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, load_in_4bit=False, dtype=torch.float32
    )
    tokenizer = get_chat_template(tokenizer, "chatml")
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    data = load_chat_data(ROWS, show=False)
    trainer = train_on_responses_only(SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer))
    assert trained_text(trainer, trainer.train_dataset) == ANSWERS
    assert trainer.train().training_loss > 0
