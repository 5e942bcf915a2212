"""What can go wrong while saving: a clear error, and never a wrong model under the folder's name."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from fastllm._errors import ArgumentError, ModelError, UnsupportedError
from fastllm.gguf.atomic import SaveError
from fastllm.models import merging, staged_folder

from ..gguf import faults
from .checkpoints import SHARDED, adapted, disturb, load, make_base, tensors_of


@pytest.fixture(scope="module")
def trained(base_of):
    return adapted(base_of("llama"))


def state_of(folder):
    """Relative path -> content of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is refused before anything is written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save_method": "merged_16bits"}, ArgumentError, "did you mean 'merged_16bit'"),
        ({"save_method": "lore"}, ArgumentError, "did you mean 'lora'"),
        ({"save_method": "fp8"}, UnsupportedError, "compressed-tensors"),
        ({"save_method": "torchao_int8"}, UnsupportedError, "torchao"),
        ({"max_shard_sizes": "5GB"}, ArgumentError, "did you mean 'max_shard_size'"),
        ({"max_shard_size": "5 apples"}, ArgumentError, "number of bytes"),
        ({"safe_serialization": False}, UnsupportedError, "pickled"),
        ({"state_dict": {}}, UnsupportedError, "not the model's"),
        ({"variant": "fp16"}, UnsupportedError, "variant"),
    ],
)
def test_arguments_that_can_not_be_served(trained, tmp_path, arguments, error, message):
    model, tokenizer = trained
    with pytest.raises(error, match=message):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer, **arguments)
    assert not (tmp_path / "merged").exists()


def test_arguments_of_unsloth_without_effect_are_told(trained, tmp_path, messages):
    model, tokenizer = trained
    model.save_pretrained_merged(
        tmp_path / "merged", tokenizer, maximum_memory_usage=0.5, temporary_location="buffers", safe_serialization=True
    )
    said = messages()
    assert "maximum_memory_usage has no effect" in said
    assert "temporary_location has no effect" in said


def test_the_base_folder_is_never_overwritten(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    model, tokenizer = adapted(base)
    before = state_of(base)
    (tmp_path / "link").symlink_to(base)
    for folder in (base, tmp_path / "link", tmp_path / "base" / ".." / "base"):
        with pytest.raises(ArgumentError, match="base checkpoint"):
            model.save_pretrained_merged(folder, tokenizer)
    assert state_of(base) == before


def test_a_model_and_an_adapter_do_not_share_a_folder(trained, tmp_path):
    model, tokenizer = trained
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArgumentError, match="holds an adapter"):
        model.save_pretrained_merged(tmp_path / "adapter", tokenizer)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    with pytest.raises(ArgumentError, match="holds a full model"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="lora")


def test_adapters_in_a_state_that_would_be_saved_wrongly(base_of, tmp_path):
    model, tokenizer = adapted(base_of("llama"))
    with model.disable_adapter(), pytest.raises(ModelError, match=r"switched off[\s\S]*enable_adapter_layers"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into the loaded weights already[\s\S]*unmerge_adapter"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    model.unmerge_adapter()
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight: [\s\S]*not numbers"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_a_base_that_has_changed_since(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    model, tokenizer = adapted(base)
    shutil.rmtree(base)
    make_base(base, "llama", intermediate_size=128)
    with pytest.raises(ModelError, match="in the model and"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_a_base_shard_that_was_cut_short(tmp_path):
    base = make_base(tmp_path / "base", SHARDED)
    model, tokenizer = load(base)
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard.name}: its tensors end at byte"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model.bin", "a\0.safetensors"])
def test_an_index_that_points_out_of_its_folder(tmp_path, name):
    base = make_base(tmp_path / "base", SHARDED)
    model, tokenizer = load(base)
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="is not the name of a safetensors file beside it"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_known_before_the_first_byte(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    monkeypatch.setattr(staged_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(merging, "write_weights", lambda *args: pytest.fail("wrote"))
    with pytest.raises(SaveError, match=r"bytes needed, 1,000 free[\s\S]*another disk") as caught:
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_disk_that_fails_at_any_moment(trained, tmp_path, monkeypatch, existing, code):
    """The folder holds the old model or the new one, or none; never a mixture, and the next run succeeds."""
    model, tokenizer = trained
    folder = tmp_path / "merged"
    if existing:
        model.save_pretrained_merged(folder, tokenizer, max_shard_size="300KB")
    for k in range(1, 200):
        with monkeypatch.context() as context:
            count = faults.interrupt_at(context, k, faults.fail_with(code))
            try:
                model.save_pretrained_merged(folder, tokenizer)
            except SaveError as error:
                assert error.errno == code
                check_old_new_or_none(folder)
            if count[0] < k:
                break
    else:
        pytest.fail("too many operations")
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors"]
    assert not (folder / ".fastllm.partial").exists()


def check_old_new_or_none(folder) -> None:
    """A folder with a config loads whole: either all shards of the old index, or the one file of the new model."""
    if not (folder / "config.json").exists():
        return
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
        assert all((folder / file).exists() for file in files)
        assert not (folder / "model.safetensors").exists()
    else:
        assert (folder / "model.safetensors").exists()
    assert len(tensors_of(folder)) == 39


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_a_process_that_is_killed_at_any_moment(trained, tmp_path, monkeypatch, existing):
    model, tokenizer = trained
    folder = tmp_path / "merged"
    if existing:
        model.save_pretrained_merged(folder, tokenizer, max_shard_size="300KB")
    kills = 0
    with monkeypatch.context() as context:
        context.setattr(merging, "check_logits", lambda *args: None)  # threads do not survive a fork
        while faults.killed_at(monkeypatch, kills + 1, lambda: model.save_pretrained_merged(folder, tokenizer)):
            kills += 1
            check_old_new_or_none(folder)
            assert kills < 200
    assert kills > 20
    model.save_pretrained_merged(folder, tokenizer)
    assert sorted(path.name for path in folder.glob("model*")) == ["model.safetensors"]
    assert not (folder / ".fastllm.partial").exists()


def test_bytes_that_the_disk_changed_are_found(trained, tmp_path, monkeypatch):
    model, tokenizer = trained
    written = merging.write_weights

    def bad_disk(plan, folder):
        checksums = written(plan, folder)
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-200, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-200, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        return checksums

    monkeypatch.setattr(merging, "write_weights", bad_disk)
    with pytest.raises(ModelError, match="its bytes on the disk are not the bytes that were written"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_a_model_that_predicts_something_else_is_not_put_in_place(trained, tmp_path, monkeypatch):
    """The last check: here the rotary base in the saved config is wrong, which no tensor shows."""
    model, tokenizer = trained
    saved_configs = merging._save_configs

    def wrong_configs(model, plan, folder):
        saved_configs(model, plan, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rms_norm_eps"] = 0.5
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(merging, "_save_configs", wrong_configs)
    with pytest.raises(ModelError, match="does not predict what the model in memory predicts"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()


def test_two_processes_can_not_save_into_one_folder(trained, tmp_path):
    model, tokenizer = trained
    with (
        staged_folder.staged_folder(tmp_path / "merged", 0),
        pytest.raises(SaveError, match="another process is saving"),
    ):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)


def test_a_link_in_the_place_of_the_staging_folder(trained, tmp_path):
    model, tokenizer = trained
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / ".fastllm.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SaveError, match="a link stands"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def test_other_files_of_the_folder_stay(trained, tmp_path):
    model, tokenizer = trained
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_an_update_that_the_dtype_can_not_hold_is_told(base_of, tmp_path, messages):
    model, tokenizer = adapted(base_of("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "up_proj" in name:
                parameter.mul_(1e-12)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert "the update of 4 of 28 adapted tensors is smaller than their dtype can hold" in messages()


def test_other_processes_of_a_distributed_run_write_nothing(trained, tmp_path):
    model, tokenizer = trained
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, is_main_process=False)
    assert not (tmp_path / "merged").exists()


def test_a_learned_prompt_can_not_be_merged(base_of, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    from fastllm.save import save_pretrained_merged

    model, tokenizer = load(base_of("llama"))
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    disturb(prompted)
    with pytest.raises(UnsupportedError, match="trains a prompt"):
        save_pretrained_merged(prompted, tmp_path / "merged", tokenizer)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "OFTConfig"])
def test_an_adapter_that_is_not_lora_is_not_left_out(base_of, tmp_path, kind):
    import peft

    from fastllm.save import save_pretrained_merged

    model, tokenizer = load(base_of("llama"))
    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    other = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"], **options))
    with pytest.raises(UnsupportedError, match=r"not LoRA[\s\S]*merge_and_unload"):
        save_pretrained_merged(other, tmp_path / "merged", tokenizer)
    with pytest.raises(UnsupportedError, match="not LoRA"):
        other.save_pretrained_gguf(tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == []
