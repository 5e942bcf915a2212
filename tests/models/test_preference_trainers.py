"""TRL's preference and reinforcement trainers, unmodified, with the keywords of older notebooks."""

import math

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from fastllm import FastLanguageModel, is_bf16_supported

COMMON = {
    "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": "none", "learning_rate": 1e-3,
    "warmup_ratio": 0.1, "optim": "adamw_8bit", "bf16": is_bf16_supported(), "fp16": not is_bf16_supported(),
}  # fmt: skip


@pytest.fixture
def loaded(checkpoint):
    model, tokenizer = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=True)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing="unsloth"), tokenizer


def check_trained(trainer):
    """Every step had a finite loss and a gradient, and moved the adapters."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3 and all(math.isfinite(e["loss"]) and e["grad_norm"] > 0 for e in steps)
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name and "ref" not in name]
    assert moved and all(p.abs().sum() > 0 for p in moved)


def test_dpo(loaded, tmp_path, messages):
    model, tokenizer = loaded
    rows = [{"prompt": f"question {i}", "chosen": f" answer {i}", "rejected": " no"} for i in range(16)]
    trainer = DPOTrainer(
        model=model, ref_model=None, tokenizer=tokenizer, train_dataset=Dataset.from_list(rows), beta=0.1,
        max_length=64, max_prompt_length=32, args=DPOConfig(output_dir=str(tmp_path), **COMMON),
    )  # fmt: skip
    assert "prompt and answer together are cut to max_length" in messages()
    check_trained(trainer)


def test_kto(loaded, tmp_path):
    model, tokenizer = loaded
    rows = [{"prompt": f"question {i}", "completion": f" answer {i}", "label": i % 2 == 0} for i in range(16)]
    args = KTOConfig(output_dir=str(tmp_path), **COMMON)
    check_trained(KTOTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)))


def test_grpo(loaded, tmp_path):
    model, tokenizer = loaded
    rows = [{"prompt": [{"role": "user", "content": f"what is {i}?"}]} for i in range(16)]

    def reward_by_place(completions, **_):
        """Never the same for all of a group, which would leave nothing to learn."""
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return [float(place) for place in range(len(completions))]

    args = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, max_completion_length=12, max_prompt_length=32, **COMMON
    )
    check_trained(
        GRPOTrainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            reward_funcs=[reward_by_place],
            train_dataset=Dataset.from_list(rows),
        )
    )
