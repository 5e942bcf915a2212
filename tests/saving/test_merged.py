"""`model.save_pretrained_merged(folder, tokenizer)`: a full model in the base's own 16-bit dtype."""

import json

import pytest
import torch

from fastllm import FastLanguageModel
from fastllm.models import merge_plan

from ..models.families import FAMILIES
from .checkpoints import (
    SHARDED,
    adapted,
    assert_rounded_once,
    disturb,
    divergence,
    load,
    make_base,
    merged_by_peft,
    on_16_bit_base,
    plain,
    tensors_of,
)

CHAT = [{"role": "user", "content": "When does it open?"}]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def check_merge(model, base, folder, scratch):
    """Adapted tensors are PEFT's float64 merge, rounded once; all others hold the base's bytes. Returns the former."""
    truth, before, saved = merged_by_peft(model, base, scratch), tensors_of(base), tensors_of(folder)
    assert set(before) <= set(saved)
    changed = []
    for name, tensor in saved.items():
        if name in before and torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)):
            assert torch.equal(truth[name].to(tensor.dtype), tensor)
            continue
        assert_rounded_once(tensor, truth[name])
        changed.append(name)
    return changed


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", [*FAMILIES, SHARDED])
def test_a_merge_is_made_of_the_16_bit_base_however_it_was_loaded(base_of, tmp_path, family, bits, messages):
    base = base_of(family)
    model, tokenizer = adapted(base, bits)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    changed = check_merge(model, base, folder, tmp_path / "adapter")
    layers = model.config.num_hidden_layers
    assert len(changed) == (4 if family == "phi3" else 7) * layers
    assert all(name.endswith("_proj.weight") for name in changed)
    assert "read back and checked: every tensor, and KL" in messages()

    merged, saved_tokenizer = plain(folder)
    assert not hasattr(merged.config, "quantization_config")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert saved_tokenizer.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    assert saved_tokenizer.padding_side == "left"
    assert divergence(on_16_bit_base(model, base, tmp_path / "adapter"), merged) < 2e-3
    assert sorted(path.name for path in folder.glob("*.safetensors*")) == sorted(
        path.name for path in base.glob("*.safetensors*")
    )


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"use_rslora": True}, {"_proj.weight"}),
        ({"use_dora": True}, {"_proj.weight"}),
        ({"bias": "lora_only"}, {"_proj.weight", "_proj.bias"}),
        ({"bias": "all"}, {"_proj.weight", "_proj.bias"}),
        ({"lora_bias": True, "target_modules": ATTENTION[:3]}, {"_proj.weight", "_proj.bias"}),
        ({"modules_to_save": ["embed_tokens"]}, {"_proj.weight", "embed_tokens.weight", "lm_head.weight"}),
        ({"trainable_token_indices": [7, 300]}, {"_proj.weight", "embed_tokens.weight"}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}, {"_proj.weight"}),
        ({"finetune_last_n_layers": 1}, {"3.self_attn", "3.mlp"}),
        ({"modules_to_save": ["norm", "input_layernorm"]}, {"_proj.weight", "norm.weight"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_kind_of_lora(base_of, tmp_path, options, changes, monkeypatch):
    """Qwen2: its query, key and value have biases, and the head is the embedding. A few rows are merged at a time."""
    monkeypatch.setattr(merge_plan, "_BLOCK_VALUES", 1000)
    base = base_of("qwen2")
    model, tokenizer = adapted(base, **options)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    if "modules_to_save" not in options or options["modules_to_save"] != ["embed_tokens"]:
        changed = check_merge(model, base, folder, tmp_path / "adapter")
        assert changed
        assert all(any(kind in name for kind in changes) for name in changed)
        assert {kind for kind in changes if any(kind in name for name in changed)} == changes
    assert divergence(model, plain(folder)[0]) < 3e-3


def test_an_embedding_trained_on_its_own_is_no_longer_the_head(base_of, tmp_path, messages):
    """PEFT trains a copy of the embedding and leaves the head as it was; the saved model keeps both apart."""
    base = base_of("qwen2")
    model, tokenizer = adapted(base, modules_to_save=["embed_tokens"])
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    saved, before = tensors_of(folder), tensors_of(base)
    assert not torch.equal(saved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(saved["lm_head.weight"], before["model.embed_tokens.weight"])
    assert plain(folder)[0].config.tie_word_embeddings is False
    assert "training has parted it from the embedding" in messages()


def test_tied_weights_stay_one_tensor(base_of, tmp_path):
    model, tokenizer = adapted(base_of("qwen2"))
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert "lm_head.weight" not in tensors_of(folder)
    merged, _ = plain(folder)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()


def test_all_active_adapters_are_merged_and_no_other(base_of, tmp_path, messages):
    base = base_of("llama")
    model, tokenizer = adapted(base, target_modules=ATTENTION)
    config = model.peft_config["default"]
    for name in ("style", "idle"):
        model.add_adapter(name, config)
        model.set_adapter(name)
        disturb(model, seed=len(name))
    model.base_model.set_adapter(["default", "style"])
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    check_merge(model, base, folder, tmp_path / "adapters")
    said = messages()
    assert "changed from default, style" in said
    assert "not merged: idle" in said


def test_shards_of_a_size_that_was_asked_for(base_of, tmp_path):
    model, tokenizer = adapted(base_of("llama"))
    whole = model.save_pretrained_merged(tmp_path / "whole", tokenizer)
    parts = model.save_pretrained_merged(tmp_path / "parts", tokenizer, max_shard_size="200KB")
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 210_000 for path in files)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    one, many = tensors_of(whole), tensors_of(parts)
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert divergence(plain(whole)[0], plain(parts)[0]) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_larger_vocabulary(base_of, tmp_path, family):
    """The new rows come from memory, the old ones from the base."""
    from fastllm import FastLanguageModel

    base = base_of(family)
    model, tokenizer = load(base, resize_model_vocab=520)
    model = FastLanguageModel.get_peft_model(model, r=4)
    disturb(model)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    saved, before = tensors_of(folder), tensors_of(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight")[: 1 + (family == "llama")]:
        assert saved[name].shape == (520, 128)
        assert torch.equal(saved[name][:512], before[name])
    merged, _ = plain(folder)
    assert merged.config.vocab_size == 520
    assert divergence(model, merged) < 2e-3


def test_without_a_16_bit_base_the_loaded_weights_are_merged(base_of, tmp_path, messages):
    """A checkpoint that is 4-bit itself: what NF4 stands for, plus the adapter, rounded to 16 bits once."""
    first, tokenizer = load(base_of("llama"))
    four_bit = first.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    model, tokenizer = adapted(four_bit, bits=4)
    messages()
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    said = messages()
    assert "merging into the loaded weights, dequantised, since" in said
    assert "is itself quantized (bitsandbytes)" in said
    merged, _ = plain(folder)
    assert not hasattr(merged.config, "quantization_config")
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {torch.bfloat16}
    assert divergence(model, merged) < 2e-3


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_base_that_has_gone_since_it_was_loaded(tmp_path, bits, messages):
    import shutil

    base = make_base(tmp_path / "base", "llama")
    model, tokenizer = adapted(base, bits)
    shutil.rmtree(base)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert "is neither a folder nor in the local cache" in messages()
    assert divergence(model, plain(folder)[0]) < 2e-3


def test_full_fine_tuning(base_of, tmp_path):
    base = base_of("llama")
    model, tokenizer = load(base, full_finetuning=True)
    disturb(model, scale=0.02)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    saved = tensors_of(folder)
    assert all(torch.equal(saved[name], p.detach().to("cpu", torch.bfloat16)) for name, p in model.named_parameters())
    assert divergence(model, plain(folder)[0]) < 2e-3


def test_loading_in_another_dtype_changes_no_weight_that_was_not_trained(base_of, tmp_path):
    base = base_of("llama")
    model, tokenizer = adapted(base, dtype=torch.float16)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert len(check_merge(model, base, folder, tmp_path / "adapter")) == 28


def test_a_module_trained_in_full_keeps_the_values_that_did_not_move(base_of, tmp_path):
    """fp16 can't hold every bf16 value; where training has not changed it, the base's is saved."""
    from fastllm import FastLanguageModel

    base = base_of("llama")
    model, tokenizer = load(base, dtype=torch.float16)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    trained = model.get_input_embeddings().modules_to_save["default"].weight
    assert trained.dtype == torch.float32
    before = tensors_of(base)["model.embed_tokens.weight"]
    assert not torch.equal(trained.to(torch.bfloat16), before)
    with torch.no_grad():
        trained[7] = 0.5
    saved = tensors_of(model.save_pretrained_merged(tmp_path / "merged", tokenizer))["model.embed_tokens.weight"]
    before[7] = 0.5
    assert torch.equal(saved, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_in_another_dtype(tmp_path, dtype):
    base = make_base(tmp_path / "base", "llama", dtype=dtype)
    model, tokenizer = adapted(base)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    check_merge(model, base, folder, tmp_path / "adapter")
    assert {tensor.dtype for tensor in tensors_of(folder).values()} == {dtype}
    assert divergence(model, plain(folder)[0]) < 1e-4


@pytest.mark.parametrize("save_method", ["merged_4bit", "merged_4bit_forced", "forced_merged_4bit", "Merged-4bit"])
def test_merged_4bit_is_a_bitsandbytes_checkpoint(base_of, tmp_path, save_method, messages):
    model, tokenizer = adapted(base_of("llama"), bits=4)
    folder = model.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method=save_method)
    assert "rounds the merged weights to 4 bits once more" in messages()
    merged, _ = plain(folder)
    assert merged.config.quantization_config.bnb_4bit_quant_type == "nf4"
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    assert merged.lm_head.weight.is_floating_point()
    assert divergence(model, merged) < 0.2


def test_a_stored_4bit_model_is_of_one_dtype_in_any_dtype(base_of, tmp_path):
    """As on a T4, where checkpoints of bf16 are loaded in fp16: norms, head and biases alike, and it computes."""
    model, tokenizer = adapted(base_of("qwen2"), bits=4)
    folder = model.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    again, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.uint8, torch.bfloat16}
    with torch.no_grad():
        assert again(torch.tensor([[5, 6, 7]], device=again.device)).logits.dtype == torch.bfloat16


def test_an_unadapted_model_is_a_copy_of_its_base(base_of, tmp_path):
    base = base_of(SHARDED)
    model, tokenizer = load(base, bits=4)
    folder = model.save_pretrained_merged(tmp_path / "copy", tokenizer)
    saved, before = tensors_of(folder), tensors_of(base)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_saving_changes_nothing_in_the_model(base_of, tmp_path):
    model, tokenizer = adapted(base_of("llama"), bits=4)
    model.train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    side = tokenizer.padding_side
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert model.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.padding_side == side


def test_any_peft_model_can_be_saved(base_of, tmp_path):
    """`fastllm.save` takes models that were trained without fastllm."""
    from fastllm.save import save_pretrained_merged

    from ..models.families import with_lora

    base = base_of("llama")
    model, tokenizer = plain(base)
    model = with_lora(model)
    folder = save_pretrained_merged(model, tmp_path / "merged", tokenizer)
    assert len(check_merge(model, base, folder, tmp_path / "adapter")) == 28
