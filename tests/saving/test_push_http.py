"""Uploads with the real `huggingface_hub` to a hub on this machine: whole or not at all, and resumed."""

import functools

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .checkpoints import adapted
from .hub_server import hub_server

TOKEN = "hf_0123456789"


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(HfApi, endpoint=server.address))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        yield server


@pytest.fixture(scope="module")
def trained(base_of):
    return adapted(base_of("llama"))


def test_a_merged_model_and_gguf_files(trained, hub, tmp_path, messages):
    model, tokenizer = trained
    model.push_to_hub_merged("me/model", tokenizer, token=TOKEN, temporary_location=tmp_path)
    model.push_to_hub_gguf("me/model", tokenizer, token=TOKEN, temporary_location=tmp_path)
    files = hub.repositories["me/model"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "llama.Q8_0.gguf", "Modelfile"} < set(files)
    local = model.save_pretrained_merged(tmp_path / "local", tokenizer)
    assert files["model.safetensors"] == (local / "model.safetensors").read_bytes()
    assert files["llama.Q8_0.gguf"].startswith(b"GGUF")
    assert {token for _, path, token in hub.requests if path.startswith("/api")} == {f"Bearer {TOKEN}"}
    assert TOKEN.encode() not in b"".join(files.values())
    assert TOKEN not in messages()


@pytest.mark.parametrize("refused", ["preupload", "objects/batch", "storage", "commit"])
def test_a_hub_that_fails_keeps_the_old_repository_and_the_saved_files(trained, hub, tmp_path, refused, messages):
    model, tokenizer = trained
    old = {"model.safetensors": b"old", "config.json": b"{}"}
    hub.repositories["me/model"] = dict(old)
    hub.refuses = (refused,)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        model.push_to_hub_merged("me/model", tokenizer, token=TOKEN, temporary_location=tmp_path)
    assert hub.repositories["me/model"] == old
    (kept,) = tmp_path.iterdir()
    assert (kept / "model.safetensors").is_file()
    assert str(kept) in messages()
    hub.refuses = ()
    before = len([path for method, path, _ in hub.requests if method == "PUT"])
    model.push_to_hub_merged("me/model", tokenizer, token=TOKEN, temporary_location=tmp_path)
    assert hub.repositories["me/model"]["model.safetensors"] == (kept / "model.safetensors").read_bytes()
    again = len([path for method, path, _ in hub.requests if method == "PUT"]) - before
    assert again == (0 if refused == "commit" else 1)  # what the hub has already is not sent twice
