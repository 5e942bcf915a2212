# %% [markdown]
# # Train on ShareGPT conversations
#
# The way notebooks do it: `standardize_sharegpt`, a `text` column, an `SFTTrainer`, `train_on_responses_only`.
#
# Run it as a script or as the notebook beside it. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
import os

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template, standardize_sharegpt, to_sharegpt, train_on_responses_only
from fastllm.data import preview, token_policy

MODEL = os.environ.get("FASTLLM_EXAMPLE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct")

# %% [markdown]
# ## The model
#
# An instruct model brings its chat template; a base model gets one.

# %%
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=False)
if not tokenizer.chat_template:
    tokenizer = get_chat_template(tokenizer, "chatml")
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
print(token_policy(tokenizer))

# %% [markdown]
# ## The data
#
# Columns become conversations of several turns with `to_sharegpt`; data that is ShareGPT already starts at
# `standardize_sharegpt`.

# %%
rows = [
    {"country": "France", "continent": "Europe", "capital": "Paris"},
    {"country": "Japan", "continent": "Asia", "capital": "Tokyo"},
    {"country": "Egypt", "continent": "", "capital": "Cairo"},
    {"country": "Peru", "continent": "South America", "capital": "Lima"},
]
dataset = to_sharegpt(
    Dataset.from_list(rows),
    merged_prompt="What is the capital of {country}?[[ It lies in {continent}.]]",
    output_column_name="capital",
    conversation_extension=2,
)
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(lambda row: {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)})
print(dataset[0]["text"])

# %% [markdown]
# ## Training
#
# What opens and ends an answer comes from the chat template; no marker strings to type.

# %%
config = SFTConfig(
    output_dir="outputs", max_steps=5, per_device_train_batch_size=2, learning_rate=2e-4, report_to="none"
)
trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
trainer = train_on_responses_only(trainer)
preview(trainer, 1)
trainer.train()

# %% [markdown]
# ## The result

# %%
FastLanguageModel.for_inference(model)
question = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=20)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
