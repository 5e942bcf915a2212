# %% [markdown]
# # Train on messages with tool calls
#
# OpenAI-style `messages`, several turns, a tool call and its result. Calls are trained, results are not.
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
# The Qwen template writes tool calls; the tokenizer keeps its own template where it has one.

# %%
model, tokenizer = FastLanguageModel.from_pretrained(MODEL, max_seq_length=1024, load_in_4bit=False)
if not tokenizer.chat_template:
    tokenizer = get_chat_template(tokenizer, "qwen-2.5")
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
print(token_policy(tokenizer))

# %% [markdown]
# ## The data
#
# Arguments stay the JSON objects they are, whatever the neighbouring rows look like.

# %%
weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
rows = [
    {
        "messages": [
            {"role": "user", "content": "How is the weather in Paris?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "content": '{"sky": "clear"}'},
            {"role": "assistant", "content": "The sky over Paris is clear."},
        ],
        "tools": [weather],
    },
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris"},
            {"role": "user", "content": "And of Italy?"},
            {"role": "assistant", "content": "Rome"},
        ]
    },
]
dataset = load_chat_data(rows, tokenizer=tokenizer)
tokens = tokenize_chats(dataset, tokenizer, max_length=1024)
preview(tokens, 2, tokenizer)

# %% [markdown]
# ## Training
#
# `tokenize_chats` renders, tokenises and masks in one pass. What is cut or left out is counted and told.
# `train_on="last"` would train the last answer of each row only.

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
