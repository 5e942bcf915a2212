"""What `SFTTrainer` is given beside a vision collator: rows as they are, lengths, settings."""

import random

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastllm import FastVisionModel
from fastllm._errors import DataError, UnsupportedError
from fastllm.models.row_list import RowList, is_rows, rows_dataset
from fastllm.packing import grouped
from fastllm.trainer import UnslothVisionDataCollator

from .conftest import picture, row


@pytest.fixture
def adapted(checkpoints):
    model, processor = FastVisionModel.from_pretrained(
        checkpoints["qwen2_5_vl"], load_in_4bit=False, dtype=torch.float32
    )
    return FastVisionModel.get_peft_model(model, r=2), processor


def make_trainer(adapted, rows, collator=None, eval_rows=None, **settings):
    model, processor = adapted
    args = SFTConfig(output_dir="unused", report_to="none", max_steps=2, save_strategy="no", bf16=False, **settings)
    return SFTTrainer(
        model=model,
        args=args,
        processing_class=processor,
        data_collator=collator or UnslothVisionDataCollator(model, processor),
        train_dataset=rows,
        eval_dataset=eval_rows,
    )


def test_the_four_compulsory_settings_are_not_needed(adapted, tmp_path, monkeypatch):
    """No remove_unused_columns, dataset_text_field, dataset_kwargs or packing settings; bare lists and an eval list."""
    monkeypatch.chdir(tmp_path)
    rows = [row(seed) for seed in range(3)] + [row(3)["messages"]]
    trainer = make_trainer(adapted, rows, eval_rows=rows[:2], per_device_train_batch_size=2)
    assert trainer.train().global_step == 2
    assert 0 < trainer.evaluate()["eval_loss"] < 8


def test_images_are_opened_when_their_row_is_used(adapted, tmp_path):
    late = {"messages": row()["messages"][1:], "images": [str(tmp_path / "late.png")]}
    late["messages"] = [{"role": "user", "content": "why"}, *late["messages"]]
    trainer = make_trainer(adapted, [row(), late])
    with pytest.raises(DataError, match="no file"):
        trainer.data_collator([trainer.train_dataset[1]])
    picture().save(tmp_path / "late.png")
    assert trainer.data_collator([trainer.train_dataset[1]])["image_grid_thw"].shape == (1, 3)


def test_one_place_for_the_length(adapted):
    model, processor = adapted
    assert UnslothVisionDataCollator(model, processor).max_seq_length == model.max_seq_length == 2048
    assert make_trainer(adapted, [row()], max_length=96).data_collator.max_seq_length == 96
    assert make_trainer(adapted, [row()]).data_collator.max_seq_length == 2048
    own = UnslothVisionDataCollator(model, processor, max_seq_length=64)
    assert make_trainer(adapted, [row()], own, max_length=96).data_collator.max_seq_length == 64


@pytest.mark.parametrize("column", [False, True], ids=["in the messages", "in a column"])
def test_trl_trains_the_same_padding_free(checkpoints, column, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row(seed, answer="fox " * (seed + 1), width=16 * (seed + 1)) for seed in range(3)]
    if column:
        for each in rows:
            each["images"] = [each["messages"][0]["content"][1].pop("image")]

    def train(**settings):
        model, processor = FastVisionModel.from_pretrained(
            checkpoints["qwen2_5_vl"], load_in_4bit=False, dtype=torch.float32
        )
        adapted = FastVisionModel.get_peft_model(model, r=2), processor
        trainer = make_trainer(
            adapted, rows, eval_rows=rows, per_device_train_batch_size=3, per_device_eval_batch_size=3,
            logging_steps=1, learning_rate=1e-2, **settings,
        )  # fmt: skip
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in history] + [trainer.evaluate()["eval_loss"]]
        return losses, [entry["grad_norm"] for entry in history]

    padded, padded_norms = train()
    got, norms = train(padding_free=True)
    assert "lays the rows of a batch end to end" in messages()
    assert got == pytest.approx(padded, rel=1e-5) and norms == pytest.approx(padded_norms, rel=1e-4)
    assert padded[-1] < padded[0]


def test_packing_puts_whole_rows_together(adapted, tmp_path, monkeypatch, messages):
    """Every row once, with all of its images, in groups within the length; those that don't fit are named."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for seed in range(8):
        paths.append(str(tmp_path / f"{seed}.png"))
        picture(seed, 8 * (1 + seed % 4), 24).save(paths[-1])
    rows = [
        {"id": seed, "messages": [{"role": "user", "content": "why"}, row()["messages"][1]], "images": [path]}
        for seed, path in enumerate(paths)
    ]
    late = {"id": "late", **row(question="the quick brown fox " * 50)}
    trainer = make_trainer(adapted, [*rows, late], eval_rows={"a": rows[:3]}, packing=True, max_length=80)
    told = messages()
    assert "8 rows of train_dataset make" in told and "id 'late' has" in told and "left out" in told
    groups = [item["packed"] for item in trainer.train_dataset]
    assert sorted(each["id"] for group in groups for each in group) == list(range(8)) and len(groups) < 8
    for group in groups:
        batch = trainer.data_collator([{"packed": group}])
        starts = (batch["position_ids"][0, 0] == 0).nonzero().flatten().tolist()
        assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] <= 80
        assert len(starts) == len(group) == len(batch["image_grid_thw"])
    assert trainer.train().global_step == 2
    assert 0 < trainer.evaluate()["eval_a_loss"] < 8


def test_packing_a_stream_is_refused_with_its_reason(adapted):
    stream = Dataset.from_list([{"messages": row()["messages"][1:]}]).to_iterable_dataset()
    with pytest.raises(UnsupportedError, match="padding_free=True"):
        make_trainer(adapted, stream, packing=True)


def test_a_damaged_row_is_found_before_a_packed_training(adapted, tmp_path):
    rows = [row(), {"messages": row()["messages"][1:], "image": str(tmp_path / "missing.png")}]
    with pytest.raises(DataError, match=r"row 1 of the data set.*no file"):
        make_trainer(adapted, rows, packing=True)


def test_groups_are_full_and_in_order():
    lengths = dict(enumerate([5, 9, 3, 7, 2, 4]))
    assert grouped(lengths, 10) == [[0, 5], [1], [2, 3], [4]]
    assert grouped({7: 10, 3: 10}, 10) == [[3], [7]]
    generator = random.Random(0)
    lengths = {number: generator.randint(1, 100) for number in range(500)}
    groups = grouped(lengths, 128)
    assert sorted(number for group in groups for number in group) == list(range(500))
    assert all(sum(lengths[number] for number in group) <= 128 for group in groups)
    assert len(groups) <= 1.02 * sum(lengths.values()) / 128 + 1


def test_a_list_of_rows_stays_what_it_is():
    rows = [row(seed) for seed in range(4)]
    dataset = rows_dataset(rows)
    assert isinstance(dataset, RowList) and len(dataset) == 4 and next(iter(dataset)) is rows[0]
    assert dataset[2] is rows[2] and dataset[1:3] == rows[1:3] and dataset.__getitems__([3, 0]) == [rows[3], rows[0]]
    assert is_rows(rows) and not is_rows(dataset) and not is_rows({"a": rows}) and not is_rows(None)
