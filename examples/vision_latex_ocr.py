# %% [markdown]
# # Reading formulas: a vision-language model learns LaTeX from pictures
#
# Nothing is downloaded: the formulas are made here and rendered with matplotlib's mathtext, and so is a small model in
# the shape of Qwen2.5-VL. It first learns to read formulas aloud ("x to the 2"), in full. Then it is a base model as
# any other, and the fine-tune below, LoRA as for the large ones, teaches it LaTeX. All that this needs comes with
# `pip install "fastllm[examples]"`.
#
# `FASTLLM_EXAMPLE_MODEL` names another base, of the hub or in a folder; `FASTLLM_EXAMPLE_OUTPUT` the output folder;
# `FASTLLM_EXAMPLE_BASE_STEPS` and `FASTLLM_EXAMPLE_STEPS` the optimiser steps of both parts; and
# `FASTLLM_EXAMPLE_RESULT` a file for what was measured.

# %%
import json
import os
import time
from pathlib import Path

import torch
from latex_base_model import conversation, machine, make_base
from latex_formulas import Page, distinct, pictures, symbols
from latex_report import edit_distance, plot_grid, plot_losses, scores, write_result
from trl import SFTConfig, SFTTrainer

from fastllm import FastVisionModel
from fastllm.trainer import UnslothVisionDataCollator

started = time.perf_counter()
ON_GPU = torch.cuda.is_available()
OUTPUT = Path(os.environ.get("FASTLLM_EXAMPLE_OUTPUT", "latex_ocr_output"))
MODEL = os.environ.get("FASTLLM_EXAMPLE_MODEL")
BASE_STEPS = int(os.environ.get("FASTLLM_EXAMPLE_BASE_STEPS", "1400" if ON_GPU else "1600"))
STEPS = int(os.environ.get("FASTLLM_EXAMPLE_STEPS", "1300" if ON_GPU else "1200"))
INSTRUCTION = "Write the LaTeX representation for this image."

# %% [markdown]
# ## Pictures of formulas
#
# Fractions, roots, powers, indices, functions of symbols: one term each. A GPU gets larger pictures, and more of them.
# Those held out are in no training, neither of the base nor of the fine-tune.

# %%
if ON_GPU:
    page, held, count, batch_size = Page(96, 48, font_size=18), 256, 1_800, 48
else:
    page, held, count, batch_size = Page(64, 32, font_size=12), 64, 1_600, 16
kind = {"terms": 1, "nested": False}

held_out = pictures(distinct(held, 1, **kind, without=symbols()), page)
excluded, images = zip(*held_out, strict=True)
truths = [formula.latex for formula in excluded]
train = pictures(distinct(min(count, batch_size * STEPS), 2, **kind, without=excluded), page)
dataset = [{"text": formula.latex, "image": image} for formula, image in train]
print(f"{len(dataset):,} formulas to learn from, {len(held_out)} held out, such as {truths[0]}")

# %% [markdown]
# ## The base model

# %%
losses = {}
base_started = time.perf_counter()
learning_rate = 2e-4
if MODEL is None:
    MODEL, learning_rate = str(OUTPUT / "base"), 2e-3  # small models take larger steps
    # Symbols one by one come first: a tower that begins with formulas takes far longer to find out what there is to
    # see. Text without pictures comes last, for the same reason.
    formulas = distinct(min(count, batch_size * BASE_STEPS), 3, **kind, without=excluded)
    lessons = [(16 * symbols(), min(200, BASE_STEPS)), (formulas, BASE_STEPS), (formulas, BASE_STEPS // 8 + 1)]
    width, layers = (256, 4) if ON_GPU else (128, 2)
    losses["base: reading aloud"] = make_base(
        Path(MODEL), lessons, page, width=width, layers=layers, batch_size=batch_size
    )
base_seconds = time.perf_counter() - base_started

# %% [markdown]
# ## The fine-tune
#
# From here on it is the script for any vision-language model.

# %%
model, processor = FastVisionModel.from_pretrained(
    MODEL,
    load_in_4bit=True,
    use_gradient_checkpointing="fastllm",
)
model = FastVisionModel.get_peft_model(
    model,
    finetune_vision_layers=True,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=True,
    r=32,
    lora_alpha=32,
    lora_dropout=0,
    bias="none",
    random_state=3407,
)


# %%
def read(images, size=256):
    """What the model writes for each picture, `size` at a time."""
    FastVisionModel.for_inference(model)
    question = [{"role": "user", "content": [{"type": "text", "text": INSTRUCTION}, {"type": "image"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    answers = []
    for first in range(0, len(images), size):
        batch = [[image.convert("RGB")] for image in images[first : first + size]]
        inputs = processor(
            images=batch, text=[text] * len(batch), padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


before = read(images)

# %%
converted_dataset = [conversation(INSTRUCTION, sample["text"], sample["image"]) for sample in dataset]

FastVisionModel.for_training(model)
trainer = SFTTrainer(
    model=model,
    processing_class=processor,
    data_collator=UnslothVisionDataCollator(model, processor, train_on_responses_only=True, resize="max"),
    train_dataset=converted_dataset,
    args=SFTConfig(
        per_device_train_batch_size=batch_size,
        warmup_steps=STEPS // 20,
        max_steps=STEPS,
        learning_rate=learning_rate,
        logging_steps=max(1, STEPS // 100),
        optim="adamw_8bit" if ON_GPU else "adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        save_strategy="no",
        seed=3407,
        output_dir=str(OUTPUT / "run"),
        report_to="none",
        **machine(),
    ),
)
tune_started = time.perf_counter()
trainer.train()
tune_seconds = time.perf_counter() - tune_started
losses["LoRA: writing LaTeX"] = [
    (entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry
]
print(model.fast_report())

# %% [markdown]
# ## Answers before and after
#
# `exact_match` is the share of formulas read without a mistake, `edit_distance` the share of characters to change.

# %%
read_started = time.perf_counter()
after = read(images)
read_seconds = time.perf_counter() - read_started
found = {"before": scores(before, truths), "after": scores(after, truths)}
for when, answers in (("before", before), ("after", after)):
    print(f"{when:7s}", *(f"{name} {value:.3f}" for name, value in found[when].items()), f"e.g. {answers[0]!r}")

plot_losses(OUTPUT / "losses.png", losses)
plot_grid(OUTPUT / "grid.png", images[:32], truths, after)
answers = [
    {"formula": truth, "before": old, "after": new, "edit_distance": edit_distance(new, truth)}
    for truth, old, new in zip(truths, before, after, strict=True)
]
(OUTPUT / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
model.save_pretrained(str(OUTPUT / "lora"))
processor.save_pretrained(str(OUTPUT / "lora"))

seconds = time.perf_counter() - started
if "FASTLLM_EXAMPLE_RESULT" in os.environ:
    measured = {
        **found, "held_out": len(truths), "batch_size": batch_size, "base_steps": BASE_STEPS, "steps": STEPS,
        "seconds": {
            "all": round(seconds), "base": round(base_seconds), "fine_tune": round(tune_seconds, 1),
            "reading_held_out": round(read_seconds, 1),
        },
        "losses": losses, "answers": answers,
    }  # fmt: skip
    write_result(Path(os.environ["FASTLLM_EXAMPLE_RESULT"]), measured)
print(f"Everything is in {OUTPUT}/ ({seconds:.0f} s in all)")
