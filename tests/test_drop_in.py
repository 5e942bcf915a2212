"""A notebook written for Unsloth, line for line, with `unsloth` renamed."""

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TextStreamer, TrainingArguments
from trl import SFTTrainer

from fastllm import FastLanguageModel, is_bfloat16_supported
from fastllm.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only

from .models.conftest import make_checkpoint

ROWS = [
    {"conversations": [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": f"it is number {i}"}]}
    for i in range(24)
]


def test_the_conversational_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    max_seq_length = 2048
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=make_checkpoint(tmp_path / "base", max_position_embeddings=2048),
        max_seq_length=max_seq_length,
        dtype=None,
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")

    def formatting_prompts_func(examples):
        convos = examples["conversations"]
        texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=False) for one in convos]
        return {"text": texts}

    dataset = standardize_sharegpt(Dataset.from_list(ROWS))
    dataset = dataset.map(formatting_prompts_func, batched=True)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer),
        dataset_num_proc=2,
        packing=False,
        args=TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_steps=1,
            max_steps=6,
            learning_rate=2e-3,
            fp16=not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir="outputs",
            report_to="none",
        ),
    )
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    row = trainer.train_dataset[5]
    assert tokenizer.decode([i for i in row["labels"] if i != -100]) == "it is number 5<|im_end|>"
    trainer_stats = trainer.train()
    assert trainer_stats.metrics["train_runtime"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    FastLanguageModel.for_inference(model)
    messages = [{"role": "user", "content": "what is 3?"}]
    inputs = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    ).to(model.device)  # fmt: skip
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    answer = model.generate(
        input_ids=inputs, streamer=streamer, max_new_tokens=8, use_cache=True, temperature=1.5, min_p=0.1
    )
    assert answer.shape[1] > inputs["input_ids"].shape[1]

    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    model.save_pretrained_merged("model", tokenizer, save_method="merged_16bit")
    model.save_pretrained_gguf("model", tokenizer, quantization_method="q8_0")
    again, _ = FastLanguageModel.from_pretrained(
        model_name="lora_model", max_seq_length=max_seq_length, dtype=None, load_in_4bit=True
    )
    FastLanguageModel.for_inference(again)
    with torch.no_grad():
        # bitsandbytes computes 4-bit inference on a CPU in bf16 where it can
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=2e-2)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert list((tmp_path / "model_gguf").glob("*.gguf"))
    assert "is called processing_class= in present TRL" in capsys.readouterr().out
