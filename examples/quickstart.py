"""Fine-tune a language model end to end, on a CPU or a GPU, with nothing downloaded.

    python examples/quickstart.py                       makes its own small base model first (about a minute on a CPU)
    python examples/quickstart.py --model NAME_OR_DIR   fine-tunes that model instead

The base model learns what Python's standard library does, from its docstrings. The chat data asks about it in questions
and answers. A 4-bit LoRA fine-tune teaches the base to answer; the answers before and after are shown, the adapter and
the merged model are saved, loaded again with plain transformers and PEFT, and asked once more.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import re
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only

LIBRARY = (
    "builtins", "bisect", "copy", "heapq", "itertools", "json", "math", "os.path", "random", "re", "shutil",
    "statistics", "string", "textwrap", "time",
)  # fmt: skip
# How documentation writes about a name: the base model reads each of these.
FORMATS = (
    "{name}: {sentence}",
    "{name} - {sentence}",
    "{name}\n    {sentence}",
    "{name}(...)\n    {sentence}",
    "* {name} -- {sentence}",
    'Help on {name}:\n\n"""{sentence}"""',
    "In Python, {name} is described like this: {sentence}",
    "The documentation of {name} says: {sentence}",
    "Notes on {name}.\n\n{sentence}",
    "| {name} | {sentence} |",
    "Now about {name}, which is part of Python.\n{sentence}",
    "# {name}\n\n{sentence}",
)
QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Tell me what {name} does.",
    "Explain {name} in one sentence.",
)
HELD_OUT = 16


def docstrings() -> list[tuple[str, str]]:
    """(name, first sentence) of what the standard library documents in one short sentence."""
    found: dict[str, str] = {}
    for module_name in LIBRARY:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, value in sorted(vars(module).items()):
            members = [(f"{prefix}{name}", value)]
            if inspect.isclass(value) and value.__module__ == module_name:
                members += [(f"{prefix}{name}.{key}", member) for key, member in sorted(vars(value).items())]
            for full_name, member in members:
                if full_name.rsplit(".", 1)[-1].startswith("_") or not callable(member):
                    continue
                text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split())
                sentence = re.split(r"(?<=[.!?])\s", text)[0]
                if 15 < len(sentence) < 100 and "->" not in sentence:
                    found.setdefault(full_name, sentence)
    return list(found.items())


def make_base(folder: Path, facts: list[tuple[str, str]], steps: int) -> Path:
    """A small Llama with its own tokenizer, trained in full on lines like `math.floor: Return the floor of x ...`."""
    lines = [text.format(name=name, sentence=sentence) for name, sentence in facts for text in FORMATS]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        lines + [question.format(name="") for question in QUESTIONS],
        trainers.BpeTrainer(vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(3407)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip

    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, full_finetuning=True)
    dataset = Dataset.from_dict({"text": lines})
    train(model, tokenizer, dataset, folder / "run", steps, batch_size=32, learning_rate=6e-3)
    model.save_pretrained(folder)
    return folder


def chat_rows(facts: list[tuple[str, str]]) -> Dataset:
    """Questions and answers in ShareGPT form, several questions a fact."""
    rows = [
        {"conversations": [{"from": "human", "value": question.format(name=name)}, {"from": "gpt", "value": sentence}]}
        for name, sentence in facts
        for question in QUESTIONS
    ]
    return Dataset.from_list(rows)


def train(model, tokenizer, dataset, folder, steps, *, batch_size, learning_rate, responses_only=False):
    """An unmodified `trl.SFTTrainer`. Prints the loss, the time and the memory."""
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=dataset,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=min(20, steps // 5),
            lr_scheduler_type="linear",
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            seed=3407,
        ),
    )
    if responses_only:
        trainer = train_on_responses_only(trainer)
    started = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"{steps} steps in {time.perf_counter() - started:.0f} s; "
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {memory_used()}\n"
    )


def memory_used() -> str:
    if torch.cuda.is_available():
        return f"peak GPU memory {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB"
    return f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def answers(model, tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers through the chat template."""
    replies = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        replies.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a hub name or a folder; without it a small base is made")
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"))
    parser.add_argument("--base-steps", type=int, default=900, help="steps of the base model's own training")
    parser.add_argument("--steps", type=int, default=300, help="steps of the fine-tune")
    options = parser.parse_args()
    started = time.perf_counter()

    facts = docstrings()
    random.Random(0).shuffle(facts)
    unseen, seen = facts[:HELD_OUT], facts[HELD_OUT:]
    makes_base = options.model is None
    if makes_base:
        print(f"1. A small base model learns {len(facts)} sentences of Python's standard library\n")
        options.model = str(make_base(options.output / "base", facts, options.base_steps))

    print(f"2. Fine-tune {options.model} on questions and answers\n")
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=256, load_in_4bit=True)
    tokenizer = tokenizer if tokenizer.chat_template else get_chat_template(tokenizer, chat_template="chatml")
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32, use_gradient_checkpointing="fastllm")
    questions = [QUESTIONS[0].format(name=name) for name, _ in unseen]
    before = answers(model, tokenizer, questions)

    dataset = standardize_sharegpt(chat_rows(seen))
    dataset = dataset.map(
        lambda row: {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)},
        remove_columns=["conversations"],
    )
    print(f"{len(dataset):,} conversations, the first one as the model sees it:\n{dataset[0]['text']}")
    train(
        model, tokenizer, dataset, options.output / "run", options.steps,
        batch_size=16, learning_rate=2e-3 if makes_base else 2e-4, responses_only=True,
    )  # fmt: skip
    print(f"{model.fast_report()}\n")

    print("3. Questions about functions that no training question was about: before and after\n")
    after = answers(model, tokenizer, questions)
    for question, (_, truth), old, new in zip(questions, unseen, before, after, strict=True):
        print(f"  {question}\n    before  {old[:80]!r}\n    after   {new!r}")
        print("" if new == truth else f"    docs    {truth!r}")
    right = [
        sum(reply == truth for reply, (_, truth) in zip(replies, unseen, strict=True)) for replies in (before, after)
    ]
    print(f"\n  word for word right: {right[0]} of {len(unseen)} before, {right[1]} of {len(unseen)} after\n")

    print("4. Save, load with plain transformers and PEFT, ask again\n")
    adapter, merged = str(options.output / "adapter"), str(options.output / "merged")
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    model.save_pretrained_merged(merged, tokenizer)
    quantization = model.config.quantization_config if getattr(model, "is_loaded_in_4bit", False) else None
    device = {"": str(model.device)}
    base = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=model.dtype, device_map=device
    )
    plain = PeftModel.from_pretrained(base, adapter).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=model.dtype, device_map=device).eval()
    for name, loaded in (("the adapter on its 4-bit base", plain), ("the merged 16-bit model", whole)):
        again = answers(loaded, AutoTokenizer.from_pretrained(adapter), questions)
        same = sum(a == b for a, b in zip(again, after, strict=True))
        print(f"  {name}: {same} of {len(after)} answers the same as before saving")
    print(f"\nEverything is in {options.output}/ ({time.perf_counter() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
