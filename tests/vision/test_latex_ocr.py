"""The LaTeX-OCR script as vision users have it, with only the import renamed."""

import pytest
import torch
from safetensors.torch import load_file

from fastllm import FastVisionModel, is_bf16_supported
from fastllm.trainer import UnslothVisionDataCollator

from .conftest import picture

INSTRUCTION = "why is the lazy dog quick"


@pytest.fixture(scope="module")
def dataset():
    return [{"image": picture(seed), "text": "the quick brown fox"[: 5 + 4 * (seed % 4)]} for seed in range(8)]


def convert_to_conversation(sample):
    conversation = [
        {
            "role": "user",
            "content": [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": sample["image"]}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": sample["text"]}]},
    ]
    return {"messages": conversation}


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_script_runs_word_for_word(checkpoint, dataset, load_in_4bit, tmp_path, monkeypatch, messages):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = FastVisionModel.from_pretrained(
        checkpoint,
        load_in_4bit=load_in_4bit,
        use_gradient_checkpointing="unsloth",
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    converted_dataset = [convert_to_conversation(sample) for sample in dataset]

    FastVisionModel.for_training(model)

    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        data_collator=UnslothVisionDataCollator(model, tokenizer),
        train_dataset=converted_dataset,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=1,
            max_steps=12,
            learning_rate=2e-2,
            fp16=not is_bf16_supported() and torch.cuda.is_available(),
            bf16=is_bf16_supported() and torch.cuda.is_available(),
            logging_steps=1,
            optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir="outputs",
            report_to="none",
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            dataset_num_proc=4,
            max_seq_length=2048,
        ),
    )
    trainer_stats = trainer.train()
    assert trainer_stats.metrics["train_runtime"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5

    FastVisionModel.for_inference(model)
    image = dataset[2]["image"]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
    input_text = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    inputs = tokenizer(
        image,
        input_text,
        add_special_tokens=False,
        return_tensors="pt",
    ).to(model.device)

    from transformers import TextStreamer

    messages()
    text_streamer = TextStreamer(tokenizer, skip_prompt=True)
    generated = model.generate(
        **inputs, streamer=text_streamer, max_new_tokens=12, use_cache=True, temperature=1.5, min_p=0.1
    )
    assert tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :]).strip() in messages()

    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    again, processor = FastVisionModel.from_pretrained(model_name="lora_model", load_in_4bit=load_in_4bit)
    FastVisionModel.for_inference(again)
    trained, reloaded = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (model, again))
    assert trained.keys() == reloaded.keys() and all(torch.equal(trained[n], reloaded[n]) for n in trained)
    # The trainer has left its autocast in the trained model's forward.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with torch.no_grad():
        ours, theirs = again(**inputs).logits, model(**inputs).logits
    # bitsandbytes repacks 4-bit weights for inference on some CPUs, with absmax in bf16.
    assert (ours - theirs).norm() <= (1e-2 if load_in_4bit else 0.0) * theirs.norm()
    assert hasattr(processor, "image_processor")
    names = {name.split(".")[3] for name in load_file("lora_model/adapter_model.safetensors")}
    assert names == {"visual", "language_model"}
