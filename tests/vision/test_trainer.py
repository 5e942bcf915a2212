"""What `SFTTrainer` is given beside a vision collator: rows as they are, lengths, settings."""

import pytest
from trl import SFTConfig, SFTTrainer

from fastllm import FastVisionModel
from fastllm._errors import DataError, UnsupportedError
from fastllm.models.row_list import RowList, is_rows, rows_dataset
from fastllm.trainer import UnslothVisionDataCollator

from .conftest import picture, row


@pytest.fixture
def adapted(checkpoints):
    model, processor = FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False)
    return FastVisionModel.get_peft_model(model, r=2), processor


def make_trainer(adapted, rows, collator=None, eval_rows=None, **settings):
    model, processor = adapted
    args = SFTConfig(output_dir="unused", report_to="none", max_steps=2, save_strategy="no", use_cpu=True, **settings)
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
        model, processor = FastVisionModel.from_pretrained(checkpoints["qwen2_5_vl"], load_in_4bit=False)
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


def test_packing_to_a_length_is_refused_with_its_reason(adapted):
    with pytest.raises(UnsupportedError, match="padding_free=True"):
        make_trainer(adapted, [row()], packing=True)


def test_a_list_of_rows_stays_what_it_is():
    rows = [row(seed) for seed in range(4)]
    dataset = rows_dataset(rows)
    assert isinstance(dataset, RowList) and len(dataset) == 4 and next(iter(dataset)) is rows[0]
    assert dataset[2] is rows[2] and dataset[1:3] == rows[1:3] and dataset.__getitems__([3, 0]) == [rows[3], rows[0]]
    assert is_rows(rows) and not is_rows(dataset) and not is_rows({"a": rows}) and not is_rows(None)
