# %% [markdown]
# # Train on raw text
#
# Continued training: every token carries loss, each text has one BOS and one EOS.
#
# Run it as a script or as the notebook beside it. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
import os

from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.data import load_chat_data, preview, token_policy, tokenize_chats

MODEL = os.environ.get("FASTLLM_EXAMPLE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct")

# %% [markdown]
# ## The model
#
# No chat template is needed for text.

# %%
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
print(token_policy(tokenizer))

# %% [markdown]
# ## The data
#
# A list of rows, a `.txt` file (paragraphs), JSONL, CSV, Parquet or a data set of the hub: the call is the same.

# %%
texts = [
    "Paris is the capital of France. It lies on the Seine.",
    "Rome is the capital of Italy. It lies on the Tiber.",
    "Berlin is the capital of Germany. It lies on the Spree.",
    "Vienna is the capital of Austria. It lies on the Danube.",
]
dataset = load_chat_data([{"text": text} for text in texts])
tokens = tokenize_chats(dataset, tokenizer, max_length=1024)
preview(tokens, 1, tokenizer)

# %% [markdown]
# ## Training
#
# An unmodified `trl.SFTTrainer` takes `input_ids` and `labels` as they are.

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
inputs = tokenizer("Paris is the capital", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))
