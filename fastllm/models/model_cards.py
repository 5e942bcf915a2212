"""Model cards: what a repository holds, what it was made from, and how to run it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .patch import unwrapped


def merged_card(model: Any, repo_id: str, method: str, tags: Sequence[str]) -> str:
    """The card of a merged model, or of an adapter (`method` "lora")."""
    is_adapter = method == "lora"
    library, loader = ("peft", "AutoPeftModelForCausalLM") if is_adapter else ("transformers", "AutoModelForCausalLM")
    how = f'from {library} import {loader}\n\nmodel = {loader}.from_pretrained("{repo_id}")'
    what = "A LoRA adapter" if is_adapter else "A model"
    relation = {"lora": "adapter", "merged_4bit": "quantized", "dynamic_4bit": "quantized"}.get(method, "finetune")
    return _card(model, repo_id, what, relation, f"```python\n{how}\n```", tags, library_name=library)


def gguf_card(model: Any, repo_id: str, files: Sequence[str], tags: Sequence[str]) -> str:
    """The card of a repository with GGUF `files`."""
    listed = "\n".join(f"- `{file}`" for file in files)
    sees = any(file.startswith("mmproj-") for file in files)
    program = "llama-server" if sees else "llama-cli"
    how = f"{listed}\n\n```sh\nollama run hf.co/{repo_id}\n{program} -hf {repo_id}\n```"
    task = "image-text-to-text" if sees else "text-generation"
    return _card(model, repo_id, "GGUF files of a model", "quantized", how, ["gguf", "llama.cpp", *tags], task=task)


def _card(
    model: Any, repo_id: str, what: str, relation: str, how: str, tags: Sequence[str], *,
    task: str = "text-generation", **fields: Any,
) -> str:  # fmt: skip
    from huggingface_hub import ModelCardData

    base = getattr(unwrapped(model), "name_or_path", "") or ""
    is_repository = base.count("/") == 1 and not os.path.exists(base)
    data = ModelCardData(
        base_model=base if is_repository else None,
        base_model_relation=relation if is_repository else None,
        pipeline_tag=task,
        tags=["fastllm", *tags],
        **fields,
    )
    made_from = f", made from [{base}](https://huggingface.co/{base})" if is_repository else ""
    title = repo_id.rsplit("/", 1)[-1]
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{what} trained with fastllm{made_from}.\n\n{how}\n"
