# %% [markdown]
# # Reading formulas: a vision-language model learns LaTeX from pictures
#
# The formulas are made here and rendered with matplotlib's mathtext, so there is nothing to download but the model:
# `pip install "fastllm[examples]"`.
#
# Run it as a script. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included, and `FASTLLM_EXAMPLE_STEPS` the
# number of optimiser steps.

# %%
import io
import os
import random

from matplotlib import mathtext
from PIL import Image
from trl import SFTConfig, SFTTrainer

from fastllm import FastVisionModel
from fastllm.trainer import UnslothVisionDataCollator

MODEL = os.environ.get("FASTLLM_EXAMPLE_MODEL", "unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit")
STEPS = int(os.environ.get("FASTLLM_EXAMPLE_STEPS", "60"))
INSTRUCTION = "Write the LaTeX representation for this image."

# %% [markdown]
# ## Pictures of formulas

# %%
LETTERS = ["a", "b", "x", "y", r"\alpha", r"\beta", r"\gamma", r"\theta"]


def formula(rng: random.Random, depth: int = 2) -> str:
    """A random formula: letters and digits under fractions, roots, powers, indices and signs."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([*LETTERS, str(rng.randint(0, 9))])
    one, other = formula(rng, depth - 1), formula(rng, depth - 1)
    forms = [rf"\frac{{{one}}}{{{other}}}", rf"\sqrt{{{one}}}", f"{{{one}}}^{{{other}}}", f"{{{one}}}_{{{other}}}"]
    return rng.choice([*forms, f"{one} + {other}", f"{one} - {other}", f"{one} = {other}"])


def picture(latex: str) -> Image.Image:
    buffer = io.BytesIO()
    mathtext.math_to_image(f"${latex}$", buffer, dpi=120, format="png")
    return Image.open(buffer).convert("RGB")


rng = random.Random(3407)
formulas = list(dict.fromkeys(formula(rng) for _ in range(2000)))
held_out, formulas = formulas[:20], formulas[20:]


def conversation(latex: str) -> dict:
    question = [{"type": "text", "text": INSTRUCTION}, {"type": "image", "image": picture(latex)}]
    answer = [{"type": "text", "text": latex}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


rows = [conversation(latex) for latex in formulas[: 8 * STEPS]]

# %% [markdown]
# ## The model and its adapters

# %%
model, processor = FastVisionModel.from_pretrained(MODEL, load_in_4bit=True, use_gradient_checkpointing="fastllm")
model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=16, finetune_vision_layers=True)
print(model.fast_report())

# %% [markdown]
# ## Answers before and after training
#
# `exact` counts formulas read without a mistake.

# %%


def read(image: Image.Image) -> str:
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = processor(image, text, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def exact() -> int:
    FastVisionModel.for_inference(model)
    return sum(read(picture(latex)) == latex for latex in held_out)


before = exact()

# %%
FastVisionModel.for_training(model)
trainer = SFTTrainer(
    model=model,
    processing_class=processor,
    data_collator=UnslothVisionDataCollator(model, processor, train_on_responses_only=True),
    train_dataset=rows,
    args=SFTConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=STEPS,
        learning_rate=2e-4,
        logging_steps=5,
        seed=3407,
        output_dir="outputs",
        report_to="none",
    ),
)
trainer.train()

# %%
after = exact()
print(f"{len(held_out)} held-out formulas: {before} read without a mistake before training, {after} after")
model.save_pretrained("latex_ocr_lora")
processor.save_pretrained("latex_ocr_lora")
