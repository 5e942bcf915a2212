# %% [markdown]
# # Train on preference pairs
#
# Rows of `prompt`, `chosen` and `rejected`, trained with TRL's `DPOTrainer`; the adapter switched off is the reference.
#
# Run it as a script or as the notebook beside it. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
import os

from trl import DPOConfig, DPOTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template
from fastllm.data import load_chat_data, token_policy

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
# Pairs are checked row by row: both sides there, of one kind, and not the same.


# %%
def pair(country, good, bad):
    return {
        "prompt": [{"role": "user", "content": f"What is the capital of {country}?"}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }


rows = [
    pair("France", "Paris", "I don't know."),
    pair("Italy", "Rome", "Milan, I guess."),
    pair("Japan", "Tokyo", "Somewhere in Asia."),
    pair("Peru", "Lima", "No idea."),
]
dataset = load_chat_data(rows)

# %% [markdown]
# ## Training
#
# An unmodified `trl.DPOTrainer`.

# %%
config = DPOConfig(
    output_dir="outputs", max_steps=3, per_device_train_batch_size=2, learning_rate=5e-6, report_to="none"
)
trainer = DPOTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
trainer.train()

# %% [markdown]
# ## The result

# %%
FastLanguageModel.for_inference(model)
question = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=20)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
