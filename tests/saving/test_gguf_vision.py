"""`model.save_pretrained_gguf(...)` of vision-language models: two files, which llama.cpp answers from as trained."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from fastllm._errors import ModelError, TokenizerError, UnsupportedError
from fastllm.gguf import GGUFReader, atomic
from fastllm.gguf.atomic import SaveError

from ..gguf import faults
from ..gguf.vision_models import FAMILIES
from .vision_checkpoints import (
    adapted_vision,
    load_vision,
    make_vision_base,
    vision_divergence,
    vision_on_16_bit_base,
)


def tensors_of(path) -> dict[str, torch.Tensor]:
    with GGUFReader(path) as reader:
        return {name: reader.data(name).clone() for name in reader.tensors}


# --- llama.cpp predicts what the trained model predicts --------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_files_are_the_adapter_on_the_16_bit_base(judge, vision_base_of, tmp_path, family, bits):
    base = vision_base_of(family)
    model, processor = adapted_vision(base, bits)
    written = model.save_pretrained_gguf(tmp_path / "out", processor, quantization_method="f32", mmproj_type="f32")
    reference = vision_on_16_bit_base(model, base, tmp_path / "adapter")
    assert vision_divergence(judge, family, written, reference, processor) < 2e-4
    assert vision_divergence(judge, family, written, reference.unload(), processor) > 0.01


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"modules_to_save": ["merger"]}], ids=lambda options: next(iter(options))
)
def test_other_kinds_of_training(judge, vision_base_of, tmp_path, options):
    base = vision_base_of("qwen2_vl")
    model, processor = adapted_vision(base, **options)
    written = model.save_pretrained_gguf(tmp_path / "out", processor, quantization_method="f32", mmproj_type="f32")
    assert vision_divergence(judge, "qwen2_vl", written, model, processor) < 2e-4


def test_adapters_of_the_tower_are_in_the_mmproj_file_and_others_are_not(vision_base_of, tmp_path):
    base = vision_base_of("qwen2_5_vl")
    untrained, processor = load_vision(base)
    before = untrained.save_pretrained_gguf(tmp_path / "base", processor)
    everywhere, _ = adapted_vision(base)
    language, _ = adapted_vision(base, finetune_vision_layers=False)
    before, both, text = (
        [tensors_of(path) for path in written["gguf_files"]]
        for written in (
            before,
            everywhere.save_pretrained_gguf(tmp_path / "both", processor),
            language.save_pretrained_gguf(tmp_path / "text", processor),
        )
    )
    changed = {name for name in before[1] if not torch.equal(before[1][name], both[1][name])}
    assert changed == {
        f"v.blk.{layer}.{name}.weight"
        for layer in range(4)
        for name in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert all(torch.equal(before[1][name], text[1][name]) for name in before[1])
    assert not torch.equal(before[0]["blk.0.attn_q.weight"], text[0]["blk.0.attn_q.weight"])


def test_the_model_in_memory_where_the_base_is_gone(judge, tmp_path):
    base = make_vision_base(tmp_path / "base", "gemma3")
    model, processor = adapted_vision(base)
    shutil.rmtree(base)
    written = model.save_pretrained_gguf(tmp_path / "out", processor, quantization_method="f32", mmproj_type="f32")
    assert vision_divergence(judge, "gemma3", written, model.float(), processor) < 2e-4


def test_a_tower_in_the_names_of_the_published_checkpoints(vision_base_of, tmp_path):
    """Gemma's have one more part in them than transformers writes now."""
    base = vision_base_of("gemma3")
    older = shutil.copytree(base, tmp_path / "gemma3")
    tensors = load_file(base / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, older / "model.safetensors", metadata={"format": "pt"})
    written = [
        adapted_vision(folder)[0].save_pretrained_gguf(tmp_path / name)["gguf_files"]
        for name, folder in (("new", base), ("old", older))
    ]
    assert [Path(path).read_bytes() for path in written[1]] == [Path(path).read_bytes() for path in written[0]]


# --- names, the files beside, and what is known before ---------------------------------------------------------------


def test_what_is_written_and_returned(vision_base_of, tmp_path, messages):
    model, processor = adapted_vision(vision_base_of("qwen2_5_vl"))
    plan = model.export_plan("gguf", quantization_method="q8_0", mmproj_type="bf16")
    written = model.save_pretrained_gguf(
        tmp_path / "reader", processor, quantization_method=["q8_0", "f16"], mmproj_type="bf16"
    )
    folder = tmp_path / "reader_gguf"
    names = ["qwen2_5_vl.Q8_0.gguf", "qwen2_5_vl.F16.gguf", "mmproj-qwen2_5_vl-BF16.gguf"]
    assert written["gguf_files"] == [str(folder / name) for name in names]
    assert written["is_vlm"] is True
    assert {path.name for path in folder.iterdir()} == {*names, "Modelfile"}
    modelfile = (folder / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./qwen2_5_vl.Q8_0.gguf\nFROM ./mmproj-qwen2_5_vl-BF16.gguf\n\nTEMPLATE")
    sizes = [os.path.getsize(folder / name) for name in names]
    first, second = plan.describe().splitlines()
    assert first.startswith(f"qwen2vl, q8_0: {sizes[0]:,} bytes, ")
    assert second.startswith(f"clip, bf16: {sizes[2]:,} bytes, ")
    assert "3 GGUF files are in" in messages()
    with GGUFReader(folder / names[0]) as reader:
        assert reader.metadata["tokenizer.chat_template"] == processor.chat_template
    with GGUFReader(folder / names[2]) as reader:
        assert reader.metadata["general.name"] == "qwen2_5_vl"


def test_mmproj_files_are_f16_where_nothing_is_said(vision_base_of, tmp_path):
    model, processor = adapted_vision(vision_base_of("gemma3"))
    written = model.save_pretrained_gguf(tmp_path / "out", processor)
    assert [Path(path).name for path in written["gguf_files"]] == ["gemma3.Q8_0.gguf", "mmproj-gemma3-F16.gguf"]
    assert model.export_plan().mmproj.quantization == "f16"


def test_the_tokenizer_of_the_processor_is_enough_where_the_model_knows_its_own(vision_base_of, tmp_path):
    from fastllm.save import save_pretrained_gguf

    base = vision_base_of("qwen2_vl")
    model, processor = adapted_vision(base)
    written = model.save_pretrained_gguf(tmp_path / "out", processor.tokenizer)
    assert len(written["gguf_files"]) == 2
    plain = AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(TokenizerError, match=r"no image processor was given[\s\S]*processor\)"):
        save_pretrained_gguf(plain, tmp_path / "plain", processor.tokenizer)
    assert not (tmp_path / "plain_gguf").exists()
    assert len(save_pretrained_gguf(plain, tmp_path / "plain", processor)["gguf_files"]) == 2


def test_dynamic_quantization_of_the_language_model(judge, vision_base_of, tmp_path):
    model, processor = adapted_vision(vision_base_of("qwen3_vl"))
    rows = [{"text": "The quick brown fox jumps over the lazy dog, and asks why it is so. " * 4}] * 4
    written = model.save_pretrained_gguf(
        tmp_path / "out", processor, "dynamic_q4_0", calibration_dataset=rows, max_seq_length=64
    )
    assert [Path(path).name for path in written["gguf_files"]] == [
        "qwen3_vl.DYNAMIC_Q4_0.gguf", "mmproj-qwen3_vl-F16.gguf"
    ]  # fmt: skip
    assert vision_divergence(judge, "qwen3_vl", written, model, processor) < 0.5


def test_the_adapter_alone(judge, vision_base_of, tmp_path):
    """llama.cpp adds it to the language model; one of the tower it would not."""
    base = vision_base_of("qwen2_5_vl")
    plain, processor = load_vision(base)
    written = plain.save_pretrained_gguf(tmp_path / "base", processor, quantization_method="f32", mmproj_type="f32")
    model, _ = adapted_vision(base, finetune_vision_layers=False)
    lora = model.save_pretrained_gguf(tmp_path / "lora", processor, save_method="lora", quantization_method="f32")
    reference = vision_on_16_bit_base(model, base, tmp_path / "adapter")
    assert vision_divergence(judge, "qwen2_5_vl", written, reference, processor, lora=lora["gguf_files"][0]) < 2e-4
    model, _ = adapted_vision(base)
    with pytest.raises(UnsupportedError, match="changes the vision part"):
        model.save_pretrained_gguf(tmp_path / "both", processor, save_method="lora")
    assert not (tmp_path / "both_gguf").exists()


# --- what is refused, and what is left when something goes wrong -----------------------------------------------------


def test_requests_that_can_not_be_served_write_nothing(vision_base_of, tmp_path):
    model, processor = adapted_vision(vision_base_of("qwen2_vl"))
    with pytest.raises(UnsupportedError, match=r"not stored as 'q4_k_m'[\s\S]*f32, f16, bf16, q8_0"):
        model.save_pretrained_gguf(tmp_path / "out", processor, mmproj_type="q4_k_m")
    with pytest.raises(UnsupportedError, match="not stored as 'q8' "):
        model.export_plan(mmproj_type="q8")
    model.config.vision_config.temporal_patch_size = 1
    with pytest.raises(UnsupportedError, match="temporal_patch_size=1"):
        model.export_plan()
    assert not list(tmp_path.iterdir())


def test_a_broken_adapter_of_the_tower_leaves_no_file(vision_base_of, tmp_path):
    model, processor = adapted_vision(vision_base_of("qwen2_vl"))
    with torch.no_grad():
        model.base_model.model.model.visual.blocks[1].attn.qkv.lora_B["default"].weight[3] = float("inf")
    with pytest.raises(ModelError, match=r"visual.blocks.1.attn.qkv.weight: [\s\S]*not numbers"):
        model.save_pretrained_gguf(tmp_path / "out", processor)
    assert list((tmp_path / "out_gguf").iterdir()) == []


def test_a_disk_with_room_for_one_of_the_files_only(vision_base_of, tmp_path, monkeypatch):
    model, processor = adapted_vision(vision_base_of("qwen2_vl"))
    plan = model.export_plan()
    needed = plan.num_bytes + plan.mmproj.num_bytes
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(SaveError, match=f"{needed:,} bytes needed, {needed - 1:,} free"):
        model.save_pretrained_gguf(tmp_path / "out", processor)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_killed_at_any_moment(vision_base_of, tmp_path, monkeypatch):
    """Under each final name there is the whole file or nothing."""
    model, processor = load_vision(vision_base_of("qwen2_vl"))

    def save():
        model.save_pretrained_gguf(tmp_path / "out", processor)

    save()
    folder, kills = tmp_path / "out_gguf", 0
    whole = {path.name: path.read_bytes() for path in folder.glob("*.gguf")}
    assert len(whole) == 2
    for name in whole:
        (folder / name).unlink()
    while faults.killed_at(monkeypatch, 5 * kills + 1, save):
        kills += 1
        assert all(path.read_bytes() == whole[path.name] for path in folder.glob("[!.]*.gguf"))
        assert kills < 200
    assert kills > 10
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*.gguf")} == whole
