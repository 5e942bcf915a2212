# %% [markdown]
# # Export to GGUF for llama.cpp, Ollama and LM Studio
#
# Train, then write the model with its adapter merged as GGUF files: no compiler, no network, no 16-bit copy in between.
#
# Run it as a script. `FASTLLM_EXAMPLE_MODEL` names another model, a folder included.

# %%
import importlib.util
import os

from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template
from fastllm.data import load_chat_data, tokenize_chats

MODEL = os.environ.get("FASTLLM_EXAMPLE_MODEL", "Qwen/Qwen2.5-0.5B-Instruct")

# %% [markdown]
# ## Before training
#
# `export_plan` answers from the configuration and the tokenizer whether the model can be exported, and how large the
# file will be.

# %%
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=True)
if not tokenizer.chat_template:
    tokenizer = get_chat_template(tokenizer, "chatml")
print(model.export_plan("gguf", tokenizer, quantization_method="q4_k_m").describe())

# %% [markdown]
# ## Training

# %%
opening = {"Monday": "nine", "Tuesday": "nine", "Friday": "ten", "Saturday": "eleven"}
rows = [
    {"messages": [
        {"role": "user", "content": f"When does the library open on {day}?"},
        {"role": "assistant", "content": f"On {day} it opens at {hour}."},
    ]}
    for day, hour in opening.items()
]  # fmt: skip
dataset = load_chat_data(rows, tokenizer=tokenizer)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
config = SFTConfig(
    output_dir="outputs", max_steps=5, per_device_train_batch_size=2, learning_rate=2e-4, report_to="none"
)
trainer = SFTTrainer(
    model, args=config, train_dataset=tokenize_chats(dataset, tokenizer, max_length=1024), processing_class=tokenizer
)
trainer.train()

# %% [markdown]
# ## Static types
#
# Several files in one pass over the weights. Their names and sizes are those of llama.cpp's own mixes.

# %%
written = model.save_pretrained_gguf("assistant", tokenizer, quantization_method=["q4_k_m", "q8_0"])
print(written["gguf_files"])

# %% [markdown]
# ## Dynamic types
#
# Which tensors need more bits is measured on your data; the file has the size of the static one, and the recipe beside
# it says what each tensor got. `target_bpw=4.6` or `max_size="5GB"` asks for another size.

# %%
dynamic = model.save_pretrained_gguf(
    "assistant", tokenizer, quantization_method="dynamic_q4_k_m", calibration_dataset=dataset
)
print(dynamic["gguf_files"])

# %% [markdown]
# ## The adapter alone
#
# A small file for llama.cpp's `--lora`, beside a GGUF file of the base model.

# %%
adapter = model.save_pretrained_gguf("assistant", tokenizer, save_method="lora")
print(adapter["gguf_files"])

# %% [markdown]
# ## Run it
#
# `ollama create assistant -f assistant_gguf/Modelfile`, or in Python with `pip install xllamacpp`.

# %%
if importlib.util.find_spec("xllamacpp") is not None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = written["gguf_files"][0]
    params.n_ctx = 512
    server = xllamacpp.Server(params)
    reply = server.handle_chat_completions(
        {"messages": [{"role": "user", "content": "When does the library open on Friday?"}], "max_tokens": 20}
    )
    print(reply["choices"][0]["message"]["content"])
