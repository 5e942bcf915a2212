"""`save_method="dynamic_4bit"`: a bitsandbytes checkpoint whose most sensitive layers stay in 16 bits."""

import json
import os

import pytest
import torch

from fastllm._errors import ArgumentError, DataError, ModelError, TokenizerError
from fastllm.models.dynamic_4bit import RECIPE_FILE, FourBitRecipe
from fastllm.save import save_pretrained_merged

from ..gguf.models import save_byte_level_tokenizer, tiny_model
from .checkpoints import adapted, divergence, load, plain, tensors_of
from .test_dynamic import CHATS, encoded, library_text, make_base, train

DYNAMIC = {"save_method": "dynamic_4bit", "calibration_dataset": CHATS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return adapted(make_base(tmp_path_factory.mktemp("dynamic_4bit") / "llama"), bits=4)


def recipe_in(folder) -> dict:
    return json.loads((folder / RECIPE_FILE).read_text())


def four_bit_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def num_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_plain_transformers_loads_the_layers_as_the_recipe_has_them(trained, tmp_path, messages):
    model, tokenizer = trained
    folder = model.save_pretrained_merged(tmp_path / "dynamic", tokenizer, **DYNAMIC)
    said = messages()
    kept = recipe_in(folder)["sixteen_bit_modules"]
    assert 0 < len(kept) < 28
    assert f"{len(kept)} of 28 linear layers stay in torch.bfloat16: {kept[0]}" in said
    assert "read back and checked: every tensor, and KL" in said

    merged, _ = plain(folder)
    skipped = merged.config.quantization_config.llm_int8_skip_modules
    assert set(skipped) == {*kept, "lm_head"}
    layers = {name for name, module in merged.named_modules() if name.endswith("_proj")}
    assert four_bit_modules(merged) == layers - set(kept)
    stored = tensors_of(folder)
    assert all(stored[f"{name}.weight"].dtype == torch.bfloat16 for name in kept)
    assert divergence(model, merged) < 0.2


def test_fastllm_loads_it_and_trains_on_it(trained, tmp_path):
    from fastllm import FastLanguageModel

    model, tokenizer = trained
    folder = model.save_pretrained_merged(tmp_path / "dynamic", tokenizer, **DYNAMIC)
    again, tokenizer = load(folder, bits=4)
    assert divergence(again, plain(folder)[0]) < 2e-3
    again = FastLanguageModel.get_peft_model(again, r=4)
    assert again.fast_report().num_fused == 4
    ids = torch.randint(5, 400, (1, 32))
    again(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for name, p in again.named_parameters() if "lora_B" in name]
    assert len(gradients) == 28
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_a_recipe_is_followed_again_without_data(trained, tmp_path):
    model, tokenizer = trained
    first = model.save_pretrained_merged(tmp_path / "a", tokenizer, **DYNAMIC)
    again = model.save_pretrained_merged(tmp_path / "b", tokenizer, save_method=str(first / RECIPE_FILE))
    one, two = tensors_of(first), tensors_of(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert recipe_in(first) == recipe_in(again)
    assert recipe_in(first)["notes"]["calibration_tokens"] > 500


def test_a_dynamic_model_is_made_anew_of_another(trained, tmp_path):
    """What a checkpoint has in 4 bits already loses nothing by them; what it has in 16 bits is measured."""
    model, tokenizer = trained
    first = model.save_pretrained_merged(tmp_path / "a", tokenizer, **DYNAMIC)
    again, tokenizer = load(first, bits=4)
    as_it_was = again.save_pretrained_merged(tmp_path / "b", tokenizer, save_method="merged_4bit")
    assert four_bit_modules(plain(as_it_was)[0]) == four_bit_modules(plain(first)[0])
    second = again.save_pretrained_merged(tmp_path / "c", tokenizer, **DYNAMIC)
    assert set(recipe_in(second)["sixteen_bit_modules"]) == set(recipe_in(first)["sixteen_bit_modules"])


def test_the_size_is_the_one_that_was_asked_for(trained, tmp_path):
    model, tokenizer = trained
    all_4bit = model.save_pretrained_merged(tmp_path / "nf4", tokenizer, save_method="merged_4bit")
    usual = model.save_pretrained_merged(tmp_path / "usual", tokenizer, **DYNAMIC)
    assert 1.05 * num_bytes(all_4bit) < num_bytes(usual) <= 1.1 * num_bytes(all_4bit)
    wanted = int(1.5 * num_bytes(all_4bit))
    by_size = model.save_pretrained_merged(tmp_path / "size", tokenizer, max_size=wanted, **DYNAMIC)
    assert 0.95 * wanted < num_bytes(by_size) <= wanted
    by_bits = model.save_pretrained_merged(tmp_path / "bits", tokenizer, target_bpw=7, **DYNAMIC)
    notes = recipe_in(by_bits)["notes"]
    assert 6.8 < notes["bits_per_weight"] <= 7
    assert notes["bytes"] == sum(tensor.nbytes for tensor in tensors_of(by_bits).values())
    sharded = model.save_pretrained_merged(tmp_path / "shards", tokenizer, max_shard_size="400KB", **DYNAMIC)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert recipe_in(sharded)["sixteen_bit_modules"] == recipe_in(usual)["sixteen_bit_modules"]


def test_a_tied_head_and_the_layers_that_are_never_4bit_stay_as_they_are(tmp_path):
    tiny_model("qwen2", num_hidden_layers=2).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    folder = model.save_pretrained_merged(tmp_path / "out", tokenizer, **DYNAMIC)
    merged, _ = plain(folder)
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert merged.lm_head.weight.is_floating_point()


def test_what_can_not_be_done_is_refused(trained, tmp_path, messages):
    model, tokenizer = trained

    def save(**options):
        return model.save_pretrained_merged(tmp_path / "out", tokenizer, **options)

    with pytest.raises(ArgumentError, match="calibration_dataset=dataset"):
        save(save_method="dynamic_4bit")
    with pytest.raises(ArgumentError, match="less is asked for"):
        save(max_size="100KB", **DYNAMIC)
    with pytest.raises(ArgumentError, match="both set the size"):
        save(max_size="2MB", target_bpw=6, **DYNAMIC)
    with pytest.raises(ArgumentError, match="max_size"):
        save(max_size="much", **DYNAMIC)
    with pytest.raises(ArgumentError, match="merged_16bit has one size"):
        save(target_bpw=6)
    with pytest.raises(TokenizerError, match="no tokenizer was given"):
        save_pretrained_merged(tiny_model("llama"), tmp_path / "out", **DYNAMIC)
    with pytest.raises(DataError):
        save(save_method="dynamic_4bit", calibration_dataset=[""])
    with pytest.raises(ModelError, match="not a recipe of a 4-bit model"):
        save(save_method=str(tmp_path / "none.json"))
    recipe = tmp_path / "other.json"
    FourBitRecipe(("model.layers.0.mlp.up_prj",)).save(recipe)
    with pytest.raises(ArgumentError, match=r"did you mean 'model.layers.0.mlp.up_proj'"):
        save(save_method=recipe)
    recipe.write_text(json.dumps({"format": "dynamic_8bit", "sixteen_bit_modules": []}))
    with pytest.raises(ModelError, match="dynamic_8bit"):
        save(save_method=recipe)
    assert os.listdir(tmp_path) == ["other.json"]
    messages()
    save(calibration_dataset=CHATS)
    assert "calibration_dataset has no effect: merged_16bit needs no calibration" in messages()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_on_a_model_with_skill_measured_layers_beat_the_first_and_last(tmp_path, family):
    """KL to the 16-bit model on held-out text: against every layer in 4 bits, and against as many bytes kept in 16 bits
    at both ends of the model."""
    text = library_text(1_200_000)
    tiny_model(family, num_hidden_layers=6).save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", full_finetuning=True, dtype=torch.float32)
    train(model, encoded(tokenizer, text[:1_000_000]), steps=400)
    held_out = encoded(tokenizer, text[1_150_000:])[: 256 * 64].view(-1, 64)
    expected = batched_log_probs(model, held_out)

    def judged(name: str, **options) -> torch.Tensor:
        folder = model.save_pretrained_merged(tmp_path / name, tokenizer, **options)
        got = batched_log_probs(plain(folder)[0], held_out)
        return (expected.exp() * (expected - got)).sum(-1).flatten()

    all_4bit = judged("nf4", save_method="merged_4bit")
    for growth, limit in ((1.1, 0.95), (1.5, 0.6)):
        size = int(growth * num_bytes(tmp_path / "nf4"))
        data = {"calibration_dataset": [text[1_000_000:1_060_000]], "max_seq_length": 128}
        measured = judged(f"measured {growth}", save_method="dynamic_4bit", max_size=size, **data)
        kept = recipe_in(tmp_path / f"measured {growth}")["sixteen_bit_modules"]
        FourBitRecipe(kept_by_place(model, kept)).save(tmp_path / "placed.json")
        placed = judged(f"placed {growth}", save_method=tmp_path / "placed.json")
        found = [float(kl.mean() / all_4bit.mean()) for kl in (measured, placed)]
        tails = [float(kl.quantile(0.99) / all_4bit.quantile(0.99)) for kl in (measured, placed)]
        print(
            f"{family}, {growth} of merged_4bit's {float(all_4bit.mean()):.2e}: measured {found[0]:.2f}, 99 %"
            f" {tails[0]:.2f}; at both ends {found[1]:.2f}, 99 % {tails[1]:.2f}"
        )
        assert max(found[0], tails[0]) <= limit
        assert found[0] <= found[1]
    assert found[0] <= 0.9 * found[1]


@torch.no_grad()
def batched_log_probs(model, rows: torch.Tensor) -> torch.Tensor:
    batches = (model(input_ids=batch, use_cache=False).logits for batch in rows.split(32))
    return torch.cat([logits.float().log_softmax(-1) for logits in batches])


def kept_by_place(model, measured: list[str]) -> tuple[str, ...]:
    """Linear layers from both ends of the model inwards, of as many weights as the measured ones have."""
    sizes = {name: m.weight.numel() for name, m in model.named_modules() if name.endswith("_proj")}
    last = model.config.num_hidden_layers - 1
    budget, kept = sum(sizes[name] for name in measured), []

    def distance(name: str) -> int:
        layer = int(name.split(".")[2])
        return min(layer, last - layer)

    for name in sorted(sizes, key=distance):
        if sizes[name] <= budget:
            budget -= sizes[name]
            kept.append(name)
    return tuple(kept)
