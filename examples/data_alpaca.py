# %% [markdown]
# # Train on Alpaca rows
#
# Rows of `instruction`, optional `input`, and `output`; the loss is taken on the answers.
#
# Run it as a script or as the notebook beside it. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
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
# The format is detected and told, with one example in which the trained part stands out.

# %%
rows = [
    {"instruction": "Name the capital.", "input": "France", "output": "Paris"},
    {"instruction": "Name the capital.", "input": "Italy", "output": "Rome"},
    {"instruction": "Name the capital of Germany.", "input": "", "output": "Berlin"},
    {"instruction": "Name the capital of Austria.", "input": "", "output": "Vienna"},
]
dataset = load_chat_data(rows, tokenizer=tokenizer)
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
