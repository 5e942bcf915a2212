"""Uploading a saved folder to a model hub in one commit, so that readers see the old repository or the new one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._notices import notice, warn
from .gguf_saving import GgufRequest, check_request, save_gguf
from .merging import SaveRequest, parse_method, save_merged
from .merging import check_request as check_merge
from .model_cards import gguf_card, merged_card

# Weights of an older model in the repository, which the same commit removes where it does not replace them.
_OLD_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


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
        return upload_merged(model, folder, files, save.save_method, upload_request)
    check_merge(save)  # before anything is made on the disk
    with _temporary_folder(upload_request.repo_id, temporary_location) as temporary:
        files = save_merged(model, replace(save, folder=temporary.path))
        temporary.is_complete = True
        return upload_merged(model, temporary.path, files, save.save_method, upload_request)


def push_gguf(model: Any, request: GgufRequest, upload_request: UploadRequest, *, temporary_location: Any) -> str:
    """Save GGUF files into a temporary folder and upload them. Returns the repository's id."""
    check_request(model, request)  # before anything is made on the disk
    with _temporary_folder(upload_request.repo_id, temporary_location) as temporary:
        written = save_gguf(model, replace(request, folder=temporary.path))
        temporary.is_complete = True
        return upload_gguf(model, written, upload_request)


def upload_merged(model: Any, folder: Path, saved: Iterable[Path], save_method: str, request: UploadRequest) -> str:
    """Upload what `save_merged` wrote. Weights of an older model go with the same commit. Returns its address."""
    method = parse_method(save_method)
    old = () if method == "lora" else _OLD_WEIGHTS
    files = {path.relative_to(folder).as_posix(): path for path in saved}
    return _commit(files, merged_card(model, request.repo_id, method, request.tags), request, replaces=old)[1]


def upload_gguf(model: Any, written: Mapping[str, Any], request: UploadRequest) -> str:
    """Upload what `save_gguf` wrote, beside whatever the repository holds. Returns the repository's id."""
    paths = [Path(path) for path in (*written["gguf_files"], written["modelfile_location"]) if path is not None]
    paths += Path(written["gguf_directory"]).glob("*.recipe.json")
    card = gguf_card(model, request.repo_id, [path.name for path in paths if path.suffix == ".gguf"], request.tags)
    return _commit({path.name: path for path in paths}, card, request)[0]


def _commit(
    files: Mapping[str, Path], card: str, request: UploadRequest, replaces: Iterable[str] = ()
) -> tuple[str, str]:
    """One commit of `files`, of the model card where the repository has none, and without files that match one of
    `replaces`. Returns (repository, the commit's address)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=request.token)
    repo_id = api.create_repo(request.repo_id, private=request.private, exist_ok=True).repo_id
    if request.revision is not None and not request.create_pr:
        api.create_branch(repo_id, branch=request.revision, exist_ok=True)
    there = set(api.list_repo_files(repo_id, revision=request.revision))
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if "README.md" not in there and "README.md" not in files:
        operations.append(CommitOperationAdd("README.md", card.encode()))
    elif request.tags:
        notice("fastllm: the repository has a model card already, and tags do not change it")
    old = [name for name in there - set(files) if any(Path(name).match(pattern) for pattern in replaces)]
    operations += [CommitOperationDelete(name) for name in old]
    commit = api.create_commit(
        repo_id, operations, commit_message=request.commit_message, commit_description=request.commit_description,
        revision=request.revision, create_pr=request.create_pr,
    )  # fmt: skip
    notice(f"fastllm: uploaded {len(files)} files to {repo_id}: {commit.commit_url}")
    return str(repo_id), str(commit.commit_url)


@dataclass
class _Temporary:
    """A folder for files that are uploaded. Once it `is_complete` it outlives an upload that fails."""

    path: Path
    is_complete: bool = False


@contextmanager
def _temporary_folder(repo_id: str, location: Any) -> Iterator[_Temporary]:
    temporary = _Temporary(Path(tempfile.mkdtemp(prefix="fastllm-push-", dir=location)))
    try:
        yield temporary
    except BaseException:
        if not temporary.is_complete:
            shutil.rmtree(temporary.path, ignore_errors=True)
            raise
        warn(
            f"the upload did not finish; the saved model is complete in {temporary.path}. To go on without saving"
            f" again:\n  hf upload {repo_id} {temporary.path}"
        )
        raise
    shutil.rmtree(temporary.path)
