"""Uploading a saved folder to a model hub in one commit, so that readers see the old repository or the new one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._notices import notice, warn
from .merging import SaveRequest, parse_method, save_merged
from .patch import unwrapped

# Weights of an older model in the repository, which the same commit removes where it does not replace them.
_OLD_WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class UploadRequest:
    """Where to upload to, and how. `token` is left out of `repr`."""

    repo_id: str
    token: Any = None
    private: bool | None = None
    commit_message: str = "Trained with fastllm"
    commit_description: str | None = None
    revision: str | None = None
    create_pr: bool = False
    tags: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"UploadRequest({self.repo_id!r}, revision={self.revision!r})"


def push_merged(
    model: Any, save: SaveRequest, upload_request: UploadRequest, *, folder: Path | None, temporary_location: Any
) -> str:
    """Save into `folder`, or a temporary one that goes when the upload is done, and upload it."""
    if folder is not None:
        files = save_merged(model, replace(save, folder=folder))
        return upload(model, folder, files, save.save_method, upload_request)
    parse_method(save.save_method)  # before anything is made on the disk
    temporary = Path(tempfile.mkdtemp(prefix="fastllm-push-", dir=temporary_location))
    try:
        files = save_merged(model, replace(save, folder=temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        address = upload(model, temporary, files, save.save_method, upload_request)
    except BaseException:
        warn(
            f"the upload did not finish; the saved model is complete in {temporary}. To go on without saving again:\n"
            f"  hf upload {upload_request.repo_id} {temporary}"
        )
        raise
    shutil.rmtree(temporary)
    return address


def upload(model: Any, folder: Path, saved: Iterable[Path], save_method: str, request: UploadRequest) -> str:
    """Upload the files that were saved in `folder`, and a model card where the repository has none. Returns the
    commit's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=request.token)
    repo_id = api.create_repo(request.repo_id, private=request.private, exist_ok=True).repo_id
    if request.revision is not None and not request.create_pr:
        api.create_branch(repo_id, branch=request.revision, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in saved}
    there = set(api.list_repo_files(repo_id, revision=request.revision))
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if "README.md" not in there and "README.md" not in files:
        operations.append(CommitOperationAdd("README.md", _model_card(model, repo_id, save_method, request).encode()))
    elif request.tags:
        notice("fastllm: the repository has a model card already, and tags do not change it")
    if parse_method(save_method) != "lora":
        old = [name for name in there - set(files) if any(Path(name).match(pattern) for pattern in _OLD_WEIGHTS)]
        operations += [CommitOperationDelete(name) for name in old]
    commit = api.create_commit(
        repo_id, operations, commit_message=request.commit_message, commit_description=request.commit_description,
        revision=request.revision, create_pr=request.create_pr,
    )  # fmt: skip
    notice(f"fastllm: uploaded {len(files)} files to {repo_id}: {commit.commit_url}")
    return str(commit.commit_url)


def _model_card(model: Any, repo_id: str, save_method: str, request: UploadRequest) -> str:
    from huggingface_hub import ModelCardData

    method = parse_method(save_method)
    base = getattr(unwrapped(model), "name_or_path", "") or ""
    is_repository = base.count("/") == 1 and not os.path.exists(base)
    relation = {"lora": "adapter", "merged_4bit": "quantized"}.get(method, "finetune")
    data = ModelCardData(
        base_model=base if is_repository else None,
        base_model_relation=relation if is_repository else None,
        library_name="peft" if method == "lora" else "transformers",
        pipeline_tag="text-generation",
        tags=["fastllm", *request.tags],
    )
    made_from = f", made from [{base}](https://huggingface.co/{base})" if is_repository else ""
    what = "A LoRA adapter" if method == "lora" else "A model"
    load = (
        f'AutoPeftModelForCausalLM.from_pretrained("{repo_id}")'
        if method == "lora"
        else f'AutoModelForCausalLM.from_pretrained("{repo_id}")'
    )
    library = "peft" if method == "lora" else "transformers"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rsplit('/', 1)[-1]}\n\n{what} trained with fastllm{made_from}.\n\n"
        f"```python\nfrom {library} import {load.split('.')[0]}\n\nmodel = {load}\n```\n"
    )
