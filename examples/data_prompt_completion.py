# %% [markdown]
# # Train on prompts and completions
#
# Two columns, as text or as messages; the loss is taken on the completion.
#
# Run it as a script or as the notebook beside it. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
import json
import os

from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template
from fastllm.data import load_chat_data, preview, token_policy, tokenize_chats

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
# A JSONL file, read line by line. Conversational pairs go through the chat template, plain ones do not.

# %%
path = "prompt_completion.jsonl"
countries = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima"}
with open(path, "w", encoding="utf-8") as file:
    for country, capital in countries.items():
        question = {"role": "user", "content": f"What is the capital of {country}?"}
        row = {"prompt": [question], "completion": [{"role": "assistant", "content": capital}]}
        file.write(json.dumps(row) + "\n")
dataset = load_chat_data(path, tokenizer=tokenizer)
tokens = tokenize_chats(dataset, tokenizer, max_length=1024)
preview(tokens, 2, tokenizer)

# %% [markdown]
# ## Training
#
# `tokenize_chats` renders, tokenises and masks in one pass. What is cut or left out is counted and told.

# %%
config = SFTConfig(
    output_dir="outputs", max_steps=5, per_device_train_batch_size=2, learning_rate=2e-4, report_to="none"
)
trainer = SFTTrainer(model, args=config, train_dataset=tokens, processing_class=tokenizer)
trainer.train()

# %% [markdown]
# ## The result

# %%
FastLanguageModel.for_inference(model)
question = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=20)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
