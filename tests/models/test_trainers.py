"""Unmodified trainers of TRL and transformers, and a raw loop, train a fastllm model; old keyword names still work."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm._errors import ArgumentError, DataError
from fastllm.compat import install_trl_shim, uninstall_trl_shim

from .families import FAMILIES, batch, build, fast_copy, with_lora

ROWS = [{"text": f"the fox number {i} jumps over dog {i * 3 % 7}"} for i in range(24)]
CONFIG = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "learning_rate": 1e-2,
}


@pytest.fixture
def loaded(checkpoint):
    def load(**options):
        peft = {name: options.pop(name) for name in ("target_modules", "modules_to_save") if name in options}
        model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, **options)
        return FastLanguageModel.get_peft_model(model, r=4, **peft), tokenizer

    return load


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trainer_with_present_names(loaded, tmp_path):
    model, tokenizer = loaded(load_in_4bit=True)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    result = trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] and result.metrics["train_runtime"] > 0
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.state.log_history[0]["mean_token_accuracy"] >= 0


def test_sft_trainer_with_the_names_of_older_notebooks(loaded, tmp_path, messages):
    model, tokenizer = loaded(load_in_4bit=False)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,
        dataset_text_field="text",
        max_seq_length=32,
        dataset_num_proc=1,
        packing=False,
        args=SFTConfig(
            warmup_ratio=0.1,
            evaluation_strategy="no",
            overwrite_output_dir=True,
            group_by_length=False,
            output_dir=str(tmp_path),
            **CONFIG,
        ),
    )
    told = messages()
    for part in ("tokenizer= is called processing_class=", "max_seq_length= is called max_length=", "warmup_ratio="):
        assert part in told
    assert trainer.args.max_length == 32 and trainer.args.warmup_steps == 0.1
    trainer.train()
    assert len(losses(trainer)) == 3


def test_plain_training_arguments_and_moved_settings(loaded, tmp_path):
    model, tokenizer = loaded(load_in_4bit=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), bf16=False, **CONFIG)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,
        dataset_text_field="text",
        max_seq_length=32,
        args=arguments,
    )
    assert isinstance(trainer.args, SFTConfig) and trainer.args.learning_rate == 1e-2 and trainer.args.max_length == 32


def test_the_length_the_model_was_loaded_for_is_used(loaded, tmp_path, messages):
    model, tokenizer = loaded(load_in_4bit=False)
    args = SFTConfig(output_dir=str(tmp_path), **CONFIG)
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    assert trainer.args.max_length == 64 and "max_length is 64" in messages()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SFTConfig(learning_rat=1), "did you mean 'learning_rate'"),
        (lambda: SFTConfig(max_seq_length=5, max_length=6), "mean the same"),
        (lambda: SFTConfig(packin=True), "did you mean 'packing'"),
    ],
)
def test_mistyped_settings_are_named(checkpoint, call, text):
    install_trl_shim()
    with pytest.raises(ArgumentError, match=text):
        call()


def test_the_shim_can_be_taken_out(checkpoint):
    install_trl_shim()
    assert "tokenizer" not in inspect.signature(SFTTrainer).parameters
    uninstall_trl_shim()
    with pytest.raises(TypeError, match="max_seq_length"):
        SFTConfig(max_seq_length=5)
    install_trl_shim()
    assert SFTConfig(max_seq_length=5, output_dir="x", bf16=False).max_length == 5


def test_a_model_that_is_not_ours_goes_to_trl_as_it_is(tmp_path, checkpoint):
    from transformers import AutoTokenizer

    install_trl_shim()
    plain = build(FAMILIES["llama"])
    args = SFTConfig(output_dir=str(tmp_path), **CONFIG)
    trainer = SFTTrainer(
        plain, args, None, Dataset.from_list(ROWS), processing_class=AutoTokenizer.from_pretrained(checkpoint)
    )
    assert trainer.args.gradient_checkpointing and trainer.args.max_length == 1024


def test_a_lora_adapter_on_the_head_trains(loaded, tmp_path):
    for bits in (True, False):
        model, tokenizer = loaded(load_in_4bit=bits, target_modules=r".*(q_proj|lm_head)")
        head = model.get_base_model().lm_head
        before = head.lora_B["default"].weight.detach().clone()
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        trainer.train()
        assert not torch.equal(head.lora_B["default"].weight, before)


def test_a_head_in_modules_to_save_trains(loaded, tmp_path):
    model, tokenizer = loaded(load_in_4bit=True, modules_to_save=["lm_head"])
    head = model.get_base_model().lm_head
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    trainer.train()
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight.float())


def sft_run(model, tokenizer, folder, **changes):
    """Losses and final adapter of an SFT run on fixed data."""
    settings = {**CONFIG, "max_steps": 4, "seed": 7, "shuffle_dataset": False, **changes}
    resume = settings.pop("resume", None)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses(trainer), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_trl_s_head_and_ours_agree(loaded, tmp_path, monkeypatch):
    """The same run through TRL's own fused head and through the one bound in its place."""
    from fastllm.models import trl_training

    precision = {"bf16": False, "fp16": False}
    ours, ours_weights = sft_run(*loaded(load_in_4bit=False, dtype=torch.float32), tmp_path / "a", **precision)
    monkeypatch.setattr(trl_training, "_bind_fused_head", lambda base: None)
    theirs, their_weights = sft_run(*loaded(load_in_4bit=False, dtype=torch.float32), tmp_path / "b", **precision)
    assert ours == pytest.approx(theirs, rel=2e-6)
    for name, weight in ours_weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("split", [(1, 4), (4, 1)], ids=["accumulated", "whole"])
def test_gradient_accumulation_in_the_trainer(loaded, tmp_path, split):
    size, steps = split
    found = []
    for rows, parts in ((2, 2), (size, steps)):
        model, tokenizer = loaded(load_in_4bit=False, dtype=torch.float32)
        split_as = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts, "bf16": False}
        found.append(sft_run(model, tokenizer, tmp_path / f"{rows}x{parts}", **split_as)[0])
    expected, got = found
    assert got == pytest.approx(expected, rel=1e-6)


def test_resume_continues_the_same_curve(loaded, tmp_path):
    whole, weights = sft_run(*loaded(load_in_4bit=True), tmp_path / "whole")
    model, tokenizer = loaded(load_in_4bit=True)
    sft_run(model, tokenizer, tmp_path / "parts", save_steps=2, max_steps=2, lr_scheduler_type="constant")
    reference, _ = sft_run(*loaded(load_in_4bit=True), tmp_path / "reference", lr_scheduler_type="constant")
    model, tokenizer = loaded(load_in_4bit=True)
    resumed, _ = sft_run(
        model,
        tokenizer,
        tmp_path / "parts",
        lr_scheduler_type="constant",
        resume=str(tmp_path / "parts" / "checkpoint-2"),
    )
    assert resumed[-2:] == reference[-2:]
    assert len(whole) == 4 and weights


def test_transformers_trainer(loaded, tmp_path):
    model, tokenizer = loaded(load_in_4bit=True)
    rows = [tokenizer(row["text"]) for row in ROWS]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), gradient_checkpointing=True, **CONFIG),
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=lambda prediction: {"vocabulary": prediction.predictions.shape[-1]},
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    metrics = trainer.evaluate()
    assert metrics["eval_vocabulary"] == model.config.vocab_size and metrics["eval_loss"] > 0


def test_raw_loop_equals_transformers(device):
    """Three hand-written AdamW steps on both sides."""
    config = FAMILIES["qwen2"]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    curves = []
    for model in (fast, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        curves.append([])
        for seed in range(3):
            loss = model(**batch(config, seed=seed, device=device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(float(loss.detach()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_dpo_trainer_runs_on_fused_layers(loaded, tmp_path):
    model, tokenizer = loaded(load_in_4bit=False)
    rows = [{"prompt": "the fox", "chosen": f" jumps {i}", "rejected": f" sleeps {i}"} for i in range(8)]
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(output_dir=str(tmp_path), beta=0.1, **CONFIG),
        train_dataset=Dataset.from_list(rows),
        tokenizer=tokenizer,
    )
    trainer.train()
    assert len(losses(trainer)) == 3 and losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)


def test_a_formatting_function_of_either_kind(loaded, tmp_path, messages):
    for function in (lambda row: row["text"] + "!", lambda rows: [text + "!" for text in rows["text"]]):
        model, tokenizer = loaded(load_in_4bit=False)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            formatting_func=function,
        )
        first = tokenizer.decode(trainer.train_dataset[0]["input_ids"])
        assert "!" in first and "fox" in first
    assert "formatting_func takes a batch" in messages()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "0 rows"),
        ([{"input_ids": [6, 7, 8], "labels": [-100, -100, -100]}] * 3, "no row is left|all labels"),
    ],
)
def test_data_that_would_train_nothing_is_refused(loaded, tmp_path, rows, text):
    model, tokenizer = loaded(load_in_4bit=False)
    with pytest.raises(DataError, match=text):
        SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def test_a_batch_without_labels_is_an_exact_zero(device):
    model = with_lora(fast_copy(build(FAMILIES["llama"], device=device)))
    inputs = batch(FAMILIES["llama"], device=device)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs).loss
    loss.backward()
    assert float(loss) == 0.0
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.parameters() if p.requires_grad)


def test_fp16_training_has_fp32_adapters(loaded, tmp_path, monkeypatch):
    """On hardware without bf16: fp16 arithmetic, fp32 adapters, whatever TRL casts them to."""
    model, tokenizer = loaded(load_in_4bit=True, dtype=torch.float16)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **CONFIG),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast(model.device.type, dtype=torch.float16):
        loss = model(**copy.deepcopy(next(iter(trainer.get_train_dataloader())))).loss
    (loss * 1024).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype is torch.float32 and torch.isfinite(g).all() for g in grads)


def test_a_second_trainer_of_a_model_computes_under_autocast_too(checkpoint, tmp_path):
    """TRL binds its head anew, over what accelerate had put around the forward and does not put there twice."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=64, load_in_4bit=False, full_finetuning=True, float32_mixed_precision=True
    )
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled(model.device.type))
    )
    for _ in range(2):
        seen.clear()
        SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), bf16=True, use_cpu=model.device.type == "cpu", **CONFIG),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        ).train()
        assert seen and all(seen)
