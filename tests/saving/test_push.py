"""`model.push_to_hub_merged("org/name", tokenizer)` and `push_to_hub_gguf`, against a hub that lives in memory."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from fastllm._errors import ArgumentError, UnsupportedError

from .checkpoints import adapted, tensors_of
from .vision_checkpoints import adapted_vision

TOKEN = "hf_secret"


@dataclass
class Hub:
    """Repositories by id and branch: file name -> content. Stands in for `huggingface_hub.HfApi`."""

    repositories: dict = field(default_factory=dict)
    commits: list = field(default_factory=list)
    tokens: list = field(default_factory=list)
    private: dict = field(default_factory=dict)
    fails: bool = False

    def __call__(self, token=None):
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repositories.setdefault(repo_id, {"main": {}})
        self.private.setdefault(repo_id, private)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, branch, exist_ok=False):
        self.repositories[repo_id].setdefault(branch, dict(self.repositories[repo_id]["main"]))

    def list_repo_files(self, repo_id, revision=None):
        return list(self.repositories[repo_id][revision or "main"])

    def create_commit(self, repo_id, operations, revision=None, **options):
        if self.fails:
            raise ConnectionError("the line went dead")
        files = copy.copy(self.repositories[repo_id][revision or "main"])
        for operation in operations:
            if isinstance(operation, CommitOperationDelete):
                del files[operation.path_in_repo]
            else:
                assert isinstance(operation, CommitOperationAdd)
                with operation.as_file() as content:
                    files[operation.path_in_repo] = content.read()
        self.repositories[repo_id][revision or "main"] = files
        self.commits.append({"repo_id": repo_id, "revision": revision, **options})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{len(self.commits)}")


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


@pytest.fixture(scope="module")
def trained(base_of):
    return adapted(base_of("llama"))


def unpacked(files: dict, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_merged_model_arrives_in_one_commit(trained, hub, tmp_path, messages):
    model, tokenizer = trained
    address = model.push_to_hub_merged(
        "me/model", tokenizer, token=TOKEN, private=True, commit_message="First", temporary_location=tmp_path,
        tags=["support"],
    )  # fmt: skip
    assert address == "https://hub/me/model/commit/1"
    assert [commit["commit_message"] for commit in hub.commits] == ["First"]
    assert hub.private == {"me/model": True}
    assert hub.tokens == [TOKEN]
    assert list(tmp_path.iterdir()) == []
    files = hub.repositories["me/model"]["main"]
    local = model.save_pretrained_merged(tmp_path / "local", tokenizer)
    assert files.keys() == {path.name for path in local.iterdir()} | {"README.md"}
    assert [path.name for path in local.iterdir() if files[path.name] != path.read_bytes()] == []
    card = files["README.md"].decode()
    assert "- support" in card
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in card
    assert TOKEN not in messages() + str(files)


def test_a_repository_with_an_older_model_is_replaced_whole(trained, hub, tmp_path):
    """Shards that the new model does not have go in the same commit; other files stay, the model card among them."""
    model, tokenizer = trained
    hub.repositories["me/model"] = {
        "main": {"model-00001-of-00002.safetensors": b"old", "model-00002-of-00002.safetensors": b"old",
                 "model.safetensors.index.json": b"{}", "README.md": b"mine", "eval/results.json": b"{}"}
    }  # fmt: skip
    model.push_to_hub_merged("me/model", tokenizer, temporary_location=tmp_path)
    files = hub.repositories["me/model"]["main"]
    assert [name for name in files if name.startswith("model")] == ["model.safetensors"]
    assert files["README.md"] == b"mine"
    assert "eval/results.json" in files
    assert len(hub.commits) == 1


def test_an_adapter_leaves_the_weights_beside_it(trained, hub, tmp_path):
    model, tokenizer = trained
    hub.repositories["me/model"] = {"main": {"model.safetensors": b"theirs"}}
    model.push_to_hub_merged("me/model", tokenizer, save_method="lora", temporary_location=tmp_path)
    files = hub.repositories["me/model"]["main"]
    assert files["model.safetensors"] == b"theirs"
    assert "adapter_model.safetensors" in files
    assert "AutoPeftModelForCausalLM" in files["README.md"].decode()


def test_a_branch_and_a_pull_request(trained, hub, tmp_path):
    model, tokenizer = trained
    model.push_to_hub_merged("model", tokenizer, revision="v2", temporary_location=tmp_path)
    assert hub.repositories["me/model"]["main"] == {}
    assert "model.safetensors" in hub.repositories["me/model"]["v2"]
    model.push_to_hub_merged("model", tokenizer, create_pr=True, temporary_location=tmp_path)
    assert hub.commits[-1]["create_pr"] is True


def test_an_upload_that_fails_keeps_what_was_saved(trained, hub, tmp_path, messages):
    model, tokenizer = trained
    hub.fails = True
    with pytest.raises(ConnectionError):
        model.push_to_hub_merged("me/model", tokenizer, token=TOKEN, temporary_location=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert len(tensors_of(kept)) == 39
    said = messages()
    assert f"hf upload me/model {kept}" in said
    assert TOKEN not in said
    assert hub.repositories["me/model"]["main"] == {}


def test_a_wrong_request_touches_neither_hub_nor_disk(trained, hub, tmp_path):
    model, tokenizer = trained
    for arguments, error in (
        ({"save_method": "merged_15bit"}, ArgumentError),
        ({"save_method": "fp8"}, UnsupportedError),
        ({"comit_message": "x"}, ArgumentError),
    ):
        with pytest.raises(error):
            model.push_to_hub_merged("me/model", tokenizer, temporary_location=tmp_path, **arguments)
    assert hub.repositories == {}
    assert list(tmp_path.iterdir()) == []


def test_saving_with_push_to_hub(trained, hub, tmp_path):
    """The repository is called like the folder."""
    model, tokenizer = trained
    model.save_pretrained_merged(tmp_path / "assistant", tokenizer, push_to_hub=True, token=TOKEN)
    files = hub.repositories["me/assistant"]["main"]
    assert files.keys() >= {path.name for path in (tmp_path / "assistant").iterdir()}
    assert list(tensors_of(unpacked(files, tmp_path / "back"))) == list(tensors_of(tmp_path / "assistant"))


def test_a_folder_of_ones_own(trained, hub, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.chdir(tmp_path)
    model.push_to_hub_merged("me/assistant", tokenizer, use_temp_dir=False)
    assert (tmp_path / "assistant" / "model.safetensors").is_file()


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_files_arrive_in_one_commit(trained, hub, tmp_path, messages):
    model, tokenizer = trained
    hub.repositories["me/model"] = {"main": {"model.safetensors": b"theirs"}}
    repo_id = model.push_to_hub_gguf(
        "me/model", tokenizer, quantization_method=["q4_0", "q8_0"], token=TOKEN, temporary_location=tmp_path
    )
    assert repo_id == "me/model"
    assert len(hub.commits) == 1
    files = hub.repositories["me/model"]["main"]
    assert files.keys() == {"model.safetensors", "llama.Q4_0.gguf", "llama.Q8_0.gguf", "Modelfile", "README.md"}
    assert files["llama.Q8_0.gguf"][:4] == b"GGUF"
    card = files["README.md"].decode()
    assert "`llama.Q4_0.gguf`" in card
    assert "ollama run hf.co/me/model" in card
    assert TOKEN not in messages() + card
    assert list(tmp_path.iterdir()) == []


def test_both_files_of_a_vision_language_model_arrive(vision_base_of, hub, tmp_path):
    model, processor = adapted_vision(vision_base_of("qwen2_vl"))
    model.push_to_hub_gguf("me/model", processor, mmproj_type="q8_0", temporary_location=tmp_path)
    files = hub.repositories["me/model"]["main"]
    assert files.keys() == {"qwen2_vl.Q8_0.gguf", "mmproj-qwen2_vl-Q8_0.gguf", "Modelfile", "README.md"}
    card = files["README.md"].decode()
    assert "`mmproj-qwen2_vl-Q8_0.gguf`" in card
    assert "llama-server -hf me/model" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_gguf_upload_that_fails_keeps_the_files(trained, hub, tmp_path, messages):
    model, tokenizer = trained
    hub.fails = True
    with pytest.raises(ConnectionError):
        model.push_to_hub_gguf("me/model", tokenizer, temporary_location=tmp_path)
    (kept,) = tmp_path.iterdir()
    assert {path.name for path in kept.iterdir()} == {"llama.Q8_0.gguf", "Modelfile"}
    assert f"hf upload me/model {kept}" in messages()


def test_a_wrong_gguf_request_touches_neither_hub_nor_disk(trained, hub, tmp_path):
    model, tokenizer = trained
    for arguments, error in (
        ({"quantization_method": "q4_k_x"}, UnsupportedError),
        ({"quantization_method": "dynamic_q4_k_m"}, ArgumentError),
        ({"comit_message": "x"}, ArgumentError),
    ):
        with pytest.raises(error):
            model.push_to_hub_gguf("me/model", tokenizer, temporary_location=tmp_path, **arguments)
    assert hub.repositories == {}
    assert list(tmp_path.iterdir()) == []


def test_saving_gguf_with_push_to_hub(trained, hub, tmp_path):
    model, tokenizer = trained
    model.save_pretrained_gguf(tmp_path / "assistant", tokenizer, push_to_hub=True, private=True)
    assert hub.repositories["me/assistant"]["main"].keys() == {"llama.Q8_0.gguf", "Modelfile", "README.md"}
    assert hub.private == {"me/assistant": True}
