"""What the saving tests and the checks of a save itself notice: bugs planted in the merge and the export."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fastllm import FastLanguageModel
from fastllm._errors import FastllmError
from fastllm.models import merge_plan
from fastllm.models.calibration import CalibrationData, calibrate
from fastllm.save import save_pretrained_merged

from ..planting import Bug, plant
from .checkpoints import (
    adapted,
    disturb,
    divergence,
    load,
    log_probs,
    merged_by_peft,
    on_16_bit_base,
    plain,
    tensors_of,
)
from .test_experts import saved_as_experts
from .test_gguf import divergence as divergence_in_llama_cpp
from .test_merged import check_merge
from .vision_checkpoints import adapted_vision, vision_divergence, vision_on_16_bit_base


@dataclass
class Setting:
    """Where a check works, and whom it may ask."""

    base_of: Callable[[str], Path]
    vision_base_of: Callable[[str], Path]
    folder: Path
    judge: Any


def merges(family="llama", bits=16, **options):
    """A merge is PEFT's in float64, and plain transformers runs it."""

    def check(at: Setting):
        base = at.base_of(family)
        model, tokenizer = adapted(base, bits, **options)
        folder = model.save_pretrained_merged(at.folder / "merged", tokenizer)
        assert check_merge(model, base, folder, at.folder / "adapter")
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert divergence(on_16_bit_base(model, base, at.folder / "adapter"), plain(folder)[0]) < 3e-3

    return check


def merges_two(at: Setting):
    base = at.base_of("llama")
    model, tokenizer = adapted(base, target_modules=["q_proj"])
    model.add_adapter("style", model.peft_config["default"])
    model.set_adapter("style")
    disturb(model, seed=5)
    model.base_model.set_adapter(["default", "style"])
    check_merge(model, base, model.save_pretrained_merged(at.folder / "m", tokenizer), at.folder / "adapters")


def merges_experts(at: Setting):
    base = at.base_of("mixtral")
    model, tokenizer = adapted(base, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    saved = tensors_of(model.save_pretrained_merged(at.folder / "merged", tokenizer))
    truth = saved_as_experts(merged_by_peft(model, base, at.folder / "adapter"), base, at.folder / "truth")
    assert all(torch.allclose(saved[name], truth[name].to(torch.bfloat16), rtol=0.02, atol=1e-4) for name in saved)


def parts_the_embedding(at: Setting):
    base = at.base_of("qwen2")
    model, tokenizer = adapted(base, modules_to_save=["embed_tokens"])
    saved = tensors_of(model.save_pretrained_merged(at.folder / "merged", tokenizer))
    assert torch.equal(saved["lm_head.weight"], tensors_of(base)["model.embed_tokens.weight"])


def grows(at: Setting):
    model, tokenizer = load(at.base_of("llama"), resize_model_vocab=520)
    model = FastLanguageModel.get_peft_model(model, r=4)
    saved = tensors_of(model.save_pretrained_merged(at.folder / "merged", tokenizer))
    added = model.get_output_embeddings().weight[512:].to("cpu", torch.bfloat16)
    assert torch.equal(saved["lm_head.weight"][512:], added)


def keeps_what_was_not_trained(at: Setting):
    base = at.base_of("llama")
    model, tokenizer = load(base, dtype=torch.float16)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    saved = tensors_of(model.save_pretrained_merged(at.folder / "merged", tokenizer))
    assert torch.equal(saved["model.embed_tokens.weight"], tensors_of(base)["model.embed_tokens.weight"])


def replaces(at: Setting):
    model, tokenizer = load(at.base_of("llama"))
    for size in ("300KB", None):
        model.save_pretrained_merged(at.folder / "merged", tokenizer, max_shard_size=size)
    assert sorted(path.name for path in (at.folder / "merged").glob("model*")) == ["model.safetensors"]


def dequantises_int8(at: Setting):
    """Without its base, an 8-bit model is saved as what it stands for, neither larger nor smaller."""
    shutil.copytree(at.base_of("llama"), at.folder / "base")
    before = tensors_of(at.folder / "base")["model.layers.0.mlp.up_proj.weight"].double()
    model, tokenizer = load(at.folder / "base", bits=8)
    shutil.rmtree(at.folder / "base")
    saved = tensors_of(model.save_pretrained_merged(at.folder / "merged", tokenizer))
    ratio = (saved["model.layers.0.mlp.up_proj.weight"].double() * before).sum() / before.square().sum()
    assert float(ratio) == pytest.approx(1, abs=1e-3)


def merges_for_inference(at: Setting):
    """An adapter that is not trained any more, loaded by PEFT alone: its biases are merged too."""
    base = at.base_of("qwen2")
    model, tokenizer = adapted(base, bias="lora_only")
    model.save_pretrained(at.folder / "adapter")
    again = PeftModel.from_pretrained(plain(base)[0], at.folder / "adapter")
    again.requires_grad_(False)
    check_merge(model, base, save_pretrained_merged(again, at.folder / "merged", tokenizer), at.folder / "truth")


def exports(**options):
    def check(at: Setting):
        model, tokenizer = adapted(at.base_of("llama"), **options)
        written = model.save_pretrained_gguf(at.folder / "out", tokenizer, quantization_method="f32")
        assert divergence_in_llama_cpp(at.judge, written["gguf_files"][0], model) < 1e-5

    return check


def exports_vision(family):
    """Both files, of an adapter in tower and decoder on the 16-bit base."""

    def check(at: Setting):
        base = at.vision_base_of(family)
        model, processor = adapted_vision(base)
        written = model.save_pretrained_gguf(at.folder / "out", processor, quantization_method="f32", mmproj_type="f32")
        reference = vision_on_16_bit_base(model, base, at.folder / "adapter")
        assert vision_divergence(at.judge, family, written, reference, processor) < 2e-4

    return check


def measures(at: Setting):
    """E[g^2] at the logits is p (1 - p)."""
    model, tokenizer = load(at.base_of("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that the likeliest token is likely
    chunks = torch.randint(5, 500, (24, 100), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": chunk.tolist()} for chunk in chunks]
    found = calibrate(model, tokenizer, CalibrationData(rows, max_length=100), gradients=True)
    p = torch.cat([log_probs(model, chunk[None]).exp() for chunk in chunks])
    expected = (p * (1 - p)).mean(0).float()
    assert float(found.gradients["lm_head.weight"].sum() / expected.sum()) == pytest.approx(1, abs=0.05)


BUGS = {
    "weight_edits": {
        "scale_forgotten": Bug(".mul_(self.scale)", "", merges()),
        "norm_of_the_base_alone": Bug("vector_norm(stored + update, dim=1)", "vector_norm(stored, dim=1)",
                                      merges(use_dora=True)),
        "first_rows_again": Bug("self.left[start : start + target.shape[0]]", "self.left[: target.shape[0]]", merges()),
        "magnitudes_of_the_first_rows": Bug("self.magnitude[start : start + stored.shape[0]]",
                                            "self.magnitude[: stored.shape[0]]", merges(use_dora=True)),
        "untrained_values_replaced": Bug("torch.where(values == loaded, merged, values.to(merged.dtype))",
                                         "values.to(merged.dtype)", keeps_what_was_not_trained),
        "token_rows_shifted": Bug("merged.device) - start", "merged.device) - start - 1",
                                  merges(trainable_token_indices=[7, 300])),
    },
    "adapted_weights": {
        "scale_of_plain_lora_under_rslora": Bug("scale = float(layer.scaling[adapter])\n    transposed",
                                                "scale = layer.lora_alpha[adapter] / layer.r[adapter]\n    transposed",
                                                merges(use_rslora=True)),
        "one_adapter_only": Bug("for adapter in _note_active(weights, layer, name, held):",
                                "for adapter in _note_active(weights, layer, name, held)[:1]:", merges_two),
        "trained_bias_forgotten": Bug('biases.get(adapter) == "lora_only"', "False", merges_for_inference),
        "bias_of_the_adapter_forgotten": Bug("if layer.lora_bias.get(adapter):", "if False:",
                                             merges("qwen2", lora_bias=True, target_modules=["q_proj"])),
        "experts_mixed_up": Bug("b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)",
                                "b.reshape(b.shape[0], experts, -1).permute(1, 0, 2)", merges_experts),
        "int8_scale_of_another_range": Bug("/ 127)", "/ 128)", dequantises_int8),
    },
    "merge_plan": {
        "parted_embedding_stays_tied": Bug("if _identity(adapters, name) == _identity(adapters, partner):", "if True:",
                                           parts_the_embedding),
        "new_rows_from_the_start": Bug("Part(self.name, start=tensor.shape[0])",
                                       "Part(self.name, stop=self.entry.shape[0] - tensor.shape[0])", grows),
        "first_rows_of_every_block": Bug("stored[start : start + rows].to(device", "stored[:rows].to(device", merges()),
        "dtype_in_memory": Bug('getattr(torch, str(written.get("dtype") or written.get("torch_dtype") or ""), None)',
                               "None", merges()),
    },
    "merging": {
        "rounded_twice": Bug("block.to(weight.entry.torch_dtype)",
                             "block.to(torch.float16).to(weight.entry.torch_dtype)", merges()),
        "quantization_config_left": Bug("del config.quantization_config", "pass", merges(bits=4)),
    },
    "staged_folder": {"old_shards_left": Bug("_retire_model(target, keep=names)", "pass", replaces)},
    "fastllm.gguf.architectures.projectors": {
        "first_frame_twice": Bug("lambda tensor: tensor[:, :, 1]", "lambda tensor: tensor[:, :, 0]",
                                 exports_vision("qwen2_vl")),
        "key_and_value_exchanged": Bug('enumerate(("q", "k", "v"))', 'enumerate(("q", "v", "k"))',
                                       exports_vision("qwen2_5_vl")),
        "no_layer_sees_the_whole_image": Bug('n_wa_pattern": _window_period(config)',
                                             'n_wa_pattern": config.num_layers + 1', exports_vision("qwen2_5_vl")),
        "deepstack_mergers_exchanged": Bug('enumerate(config.get("deepstack_visual_indexes", ()))',
                                           'enumerate(config.get("deepstack_visual_indexes", ())[::-1])',
                                           exports_vision("qwen3_vl")),
        "norm_of_the_projector_less_one": Bug("(width,), plus_one)", "(width,))", exports_vision("gemma3")),
        "deviation_of_another_colour": Bug("[finite(key, value) for value in values]",
                                           "[finite(key, value) for value in values[::-1]]", exports_vision("gemma3")),
    },
    "fastllm.gguf.architectures.qwen": {
        "sections_exchanged": Bug("[*sections, 0]", "[*sections[::-1], 0]", exports_vision("qwen2_vl")),
    },
    "gguf_saving": {
        "adapter_of_the_tower_forgotten": Bug("if weight.edits:", 'if weight.edits and "visual" not in weight.name:',
                                              exports_vision("qwen2_vl")),
        "adapter_forgotten": Bug("if weight.edits:", "if False:", exports()),
        "first_block_only": Bug("for _, block in weight.merged(device=device)]",
                                "for _, block in list(weight.merged(device=device))[:1]]", exports()),
    },
    "calibration": {
        "mean_of_the_loss": Bug('reduction="sum"', 'reduction="mean"', measures),
        "likeliest_labels": Bug("torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]",
                                "logits.detach().argmax(-1)", measures),
    },
}  # fmt: skip


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, base_of, vision_base_of, judge, monkeypatch, tmp_path):
    monkeypatch.setattr(merge_plan, "_BLOCK_VALUES", 5000)  # blocks of some 40 rows
    for name in ("sound", "planted", "source"):
        (tmp_path / name).mkdir()
    bug.check(Setting(base_of, vision_base_of, tmp_path / "sound", judge))
    with monkeypatch.context() as planting:
        plant(module if "." in module else f"fastllm.models.{module}", bug, planting, tmp_path / "source")
        with pytest.raises((AssertionError, FastllmError, RuntimeError)):
            bug.check(Setting(base_of, vision_base_of, tmp_path / "planted", judge))
