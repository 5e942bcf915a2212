"""Planning and streaming: what is refused before any work, and what a file is when something goes wrong."""

from __future__ import annotations

import errno
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from fastllm._errors import FastllmError, ModelError, TokenizerError, UnsupportedError
from fastllm.gguf import ExplicitRecipe, GGUFReader, export_gguf, export_plan
from fastllm.gguf.architectures import ARCHITECTURES, architecture_of
from fastllm.gguf.atomic import SaveError
from fastllm.gguf.container import GGUFError
from fastllm.gguf.quantizers import quantizer_of

from . import models
from .faults import fail_with, interrupt_at, killed_at


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return models.save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def small():
    """A model of one layer: few operations to interrupt."""
    return models.tiny_model("llama", num_hidden_layers=1)


def export(model, tokenizer_dir, outputs, tensors=None, **options):
    return export_gguf(
        outputs,
        config=options.pop("config", None) or model.config.to_dict(),
        tokenizer_dir=tokenizer_dir,
        tensors=model.named_parameters() if tensors is None else tensors,
        **options,
    )


def decoded(path) -> dict[str, torch.Tensor]:
    """All tensors of a GGUF file as fp32."""
    with GGUFReader(path) as reader:
        return {
            name: quantizer_of(info.type).decode(reader.data(name)).view(info.shape)
            for name, info in reader.tensors.items()
        }


def test_the_plan_knows_the_size_of_the_file_to_the_byte(small, tokenizer_dir, tmp_path):
    for quantization in ("f32", "q8_0", "q4_k_m", "q2_k"):
        plan = export_plan(small.config.to_dict(), tokenizer_dir, quantization)
        path = tmp_path / f"{quantization}.gguf"
        export(small, tokenizer_dir, {path: quantization})
        assert path.stat().st_size == plan.num_bytes
        assert f"{plan.num_bytes:,} bytes" in plan.describe()


def test_a_plan_needs_no_weights_and_little_time(tokenizer_dir):
    """An 8B model's size from its configuration alone."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    plan = export_plan(config, tokenizer_dir, "q4_k_m")
    assert plan.num_weights == 8_030_261_248
    assert plan.bits_per_weight == pytest.approx(4.90, abs=0.01)
    # the published Llama 3.1 8B Q4_K_M file has 4,920 MB
    assert sum(info.num_bytes for info in plan.tensors) == pytest.approx(4_912_000_000, rel=1e-3)


def test_several_files_are_written_in_one_pass(small, tokenizer_dir, tmp_path):
    reads = []

    def tensors():
        for name, tensor in small.named_parameters():
            reads.append(name)
            yield name, tensor

    outputs = {tmp_path / f"{name}.gguf": name for name in ("f16", "q8_0", "q4_k_m")}
    plans = export(small, tokenizer_dir, outputs, tensors())
    assert [plan.quantization for plan in plans] == ["f16", "q8_0", "q4_k_m"]
    assert len(reads) == len(set(reads))
    for path, quantization in outputs.items():
        alone = tmp_path / "alone.gguf"
        export(small, tokenizer_dir, {alone: quantization})
        assert alone.read_bytes() == path.read_bytes()


def test_tensors_may_come_in_any_order(small, tokenizer_dir, tmp_path):
    forwards, backwards = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export(small, tokenizer_dir, {forwards: "q4_k_m"})
    export(small, tokenizer_dir, {backwards: "q4_k_m"}, reversed(list(small.named_parameters())))
    assert forwards.read_bytes() == backwards.read_bytes()


def test_the_16_bit_weights_of_a_bf16_model_are_its_own(tokenizer_dir, tmp_path):
    model = models.tiny_model("llama").bfloat16()
    config = model.config.to_dict() | {"dtype": "bfloat16"}
    export(model, tokenizer_dir, {tmp_path / "a.gguf": "not_quantized"}, config=config)
    weights = decoded(tmp_path / "a.gguf")
    assert torch.equal(weights["blk.1.ffn_down.weight"], model.model.layers[1].mlp.down_proj.weight.float())
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.metadata["general.file_type"] == 32


@pytest.mark.parametrize(("family", "renames"), [
    ("mixtral", {"mlp.gate.": "block_sparse_moe.gate.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3",
                 "mlp.experts": "block_sparse_moe.experts"}),
    ("qwen3moe", {}),
])  # fmt: skip
def test_experts_may_come_fused_or_one_by_one(tokenizer_dir, tmp_path, family, renames):
    """A live model has gate_up_proj [E, 2 F, D]; checkpoints have each expert's matrices under names of their own."""
    model = models.tiny_model(family)

    def as_in_a_checkpoint():
        for name, tensor in model.named_parameters():
            parts = [(name, tensor)]
            if name.endswith("gate_up_proj"):
                gate, up = tensor.chunk(2, dim=1)
                base = name.removesuffix(".gate_up_proj")
                parts = [
                    (f"{base}.{expert}.{kind}_proj.weight", matrices[expert])
                    for kind, matrices in (("gate", gate), ("up", up))
                    for expert in range(tensor.shape[0])
                ]
            elif name.endswith("experts.down_proj"):
                base = name.removesuffix(".down_proj")
                parts = [(f"{base}.{expert}.down_proj.weight", tensor[expert]) for expert in range(tensor.shape[0])]
            for part, values in parts:
                for old, new in renames.items():
                    part = part.replace(old, new)
                yield part, values

    fused, single = tmp_path / "fused.gguf", tmp_path / "single.gguf"
    export(model, tokenizer_dir, {fused: "q4_k_m"})
    export(model, tokenizer_dir, {single: "q4_k_m"}, as_in_a_checkpoint())
    one, other = decoded(fused), decoded(single)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-2) for name in one)


def test_the_text_part_of_a_vision_model(tokenizer_dir, tmp_path):
    """Its tensors have a prefix, its configuration is nested; the tower is left out, which is told."""
    model = models.tiny_model("gemma3")
    nested = {"model_type": "gemma3", "text_config": model.config.to_dict(), "vision_config": {}}
    prefixed = [(f"model.language_model.{name.removeprefix('model.')}", t) for name, t in model.named_parameters()]
    tower = [("model.vision_tower.embeddings.weight", torch.zeros(2, 2))]
    export(model, tokenizer_dir, {tmp_path / "text.gguf": "q8_0"})
    export(model, tokenizer_dir, {tmp_path / "vision.gguf": "q8_0"}, tower + prefixed, config=nested)
    one, other = decoded(tmp_path / "text.gguf"), decoded(tmp_path / "vision.gguf")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_importance_reaches_the_quantizers(small, tokenizer_dir, tmp_path):
    importance = {"blk.0.ffn_up.weight": torch.rand(256) ** 4}
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    export(small, tokenizer_dir, {plain: "q4_k_m"})
    export(small, tokenizer_dir, {weighted: "q4_k_m"}, importance=importance)
    weight = small.model.layers[0].mlp.up_proj.weight.detach()

    def error(path):
        return float(((decoded(path)["blk.0.ffn_up.weight"] - weight) ** 2 * importance["blk.0.ffn_up.weight"]).sum())

    assert error(weighted) < 0.97 * error(plain)
    with pytest.raises(GGUFError, match=r"did you mean 'blk\.0\.ffn_up\.weight'"):
        export(small, tokenizer_dir, {plain: "q4_k_m"}, importance={"blk.0.ffn_upp.weight": torch.ones(256)})


def test_each_expert_has_its_own_importance(tokenizer_dir, tmp_path):
    model = models.tiny_model("qwen3moe")
    name = "blk.0.ffn_gate_exps.weight"
    importance = torch.ones(4, 256)
    importance[2, ::2] = 100.0
    export(model, tokenizer_dir, {tmp_path / "a.gguf": "q4_k_s"})
    export(model, tokenizer_dir, {tmp_path / "b.gguf": "q4_k_s"}, importance={name: importance})
    one, other = decoded(tmp_path / "a.gguf")[name], decoded(tmp_path / "b.gguf")[name]
    assert [torch.equal(one[i], other[i]) for i in range(4)] == [True, True, False, True]


def test_an_explicit_recipe_is_followed(small, tokenizer_dir, tmp_path):
    recipe = ExplicitRecipe("mine", "q4_k_m", {"blk.0.attn_q.weight": "Q8_0"})
    (plan,) = export(small, tokenizer_dir, {tmp_path / "a.gguf": recipe})
    assert plan.quantization == "mine"
    with GGUFReader(tmp_path / "a.gguf") as reader:
        assert reader.tensors["blk.0.attn_q.weight"].type.name == "Q8_0"
        assert reader.metadata["general.file_type"] == 15


def test_progress_counts_weights(small, tokenizer_dir, tmp_path):
    seen = []
    (plan,) = export(small, tokenizer_dir, {tmp_path / "a.gguf": "f16"}, progress=lambda *state: seen.append(state))
    done = [state[0] for state in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] == plan.num_weights


CONVERTER = json.loads((Path(__file__).parent / "data" / "convert_hf_to_gguf.json").read_text())["families"]
# Keys that the converter leaves to llama.cpp's defaults and we write out.
EXPLICIT = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
            "rope.scaling.type")  # fmt: skip


@pytest.mark.parametrize("family", models.FAMILIES)
def test_keys_and_tensors_are_those_of_llama_cpps_converter(tokenizer_dir, family):
    plan = export_plan(models.tiny_model(family).config.to_dict(), tokenizer_dir, "f16")
    expected = CONVERTER[family]
    ours = {
        key: torch.tensor(value).item() if isinstance(value, float) else value  # as fp32
        for key, value in plan.metadata.items()
        if not key.startswith("tokenizer.")
    }
    assert ours | expected["metadata"] == ours
    more = ours.keys() - expected["metadata"].keys() - {"general.name", "general.quantized_by"}
    assert {key.split(".", 1)[1] for key in more} <= set(EXPLICIT)
    tensors = {
        re.sub(r"^blk\.\d+", "blk.*", i.name): f"{i.type.name} {'x'.join(map(str, i.shape))}" for i in plan.tensors
    }
    assert tensors == expected["tensors"]


# --- refused before any work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama5", None, 3])
def test_unknown_architectures_are_refused(tokenizer_dir, model_type):
    with pytest.raises(UnsupportedError, match="save merged_16bit"):
        export_plan({"model_type": model_type}, tokenizer_dir, "q4_k_m")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("qwen2", {"head_dim": 128}),
        ("qwen2, yarn", {"rope_parameters": models.YARN | {"attention_factor": 2.0}}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3moe", {"norm_topk_prob": False}),
        ("qwen3moe", {"mlp_only_layers": [0]}),
        ("qwen3moe", {"decoder_sparse_step": 2}),
        ("gemma2", {"query_pre_attn_scalar": 100}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * 4}),
        ("gemma3", {"layer_types": ["full_attention"] * 7}),
        ("gemma", {"tie_word_embeddings": False}),
    ],
)
def test_settings_that_llama_cpp_gets_wrong_are_refused(tokenizer_dir, family, settings):
    config = models.tiny_model(family).config.to_dict() | settings
    with pytest.raises(UnsupportedError):
        export_plan(config, tokenizer_dir, "q4_k_m")


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 2**40},
        {"vocab_size": -1},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 0},
        {"num_attention_heads": "four"},
        {"intermediate_size": None},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "1e-5"},
        {"max_position_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}},
    ],
)
def test_configurations_that_make_no_sense_are_refused(small, tokenizer_dir, settings):
    with pytest.raises(ModelError):
        export_plan(small.config.to_dict() | settings, tokenizer_dir, "q4_k_m")


@pytest.mark.parametrize("quantization", ["q4_k_x", "iq2_xxs", 4, None])
def test_unknown_quantizations_are_refused(small, tokenizer_dir, quantization):
    with pytest.raises(UnsupportedError):
        export_plan(small.config.to_dict(), tokenizer_dir, quantization)


def test_a_missing_tokenizer_is_refused(small, tmp_path):
    with pytest.raises(TokenizerError, match="save_pretrained"):
        export_plan(small.config.to_dict(), tmp_path, "q4_k_m")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(small, tokenizer_dir):
    with pytest.raises(TokenizerError, match="resize_token_embeddings"):
        export_plan(small.config.to_dict() | {"vocab_size": 300}, tokenizer_dir, "q4_k_m")


def test_every_architecture_is_known_by_its_model_types():
    names = [name for architecture in ARCHITECTURES for name in architecture.model_types]
    assert len(names) == len(set(names))
    for family in models.FAMILIES.values():
        assert family.model_type in names


def test_a_model_not_called_phi3_keeps_its_spaces(small, tokenizer_dir):
    """llama.cpp reads from the name how spaces behind special tokens are treated."""
    for name, expected in (("my-Phi3-chat", "my-Phi 3-chat"), ("phi-3", "phi 3"), ("mine", "mine")):
        plan = export_plan(small.config.to_dict(), tokenizer_dir, "f16", name=name)
        assert plan.metadata["general.name"] == expected


# --- refused on the way, without a file under the final name ---------------------------------------------------------


def broken_streams(model):
    tensors = list(model.named_parameters())
    name, weight = next((name, tensor) for name, tensor in tensors if name.endswith("up_proj.weight"))
    nan = weight.detach().clone()
    nan[3, 5] = float("nan")
    without = [pair for pair in tensors if pair[0] != name]
    return {
        "missing or not whole: blk.0.ffn_up.weight": without,
        "did you mean 'model.layers.0.mlp.up_proj.weight'": [*without, (name.replace("up_proj", "upp_proj"), weight)],
        "arrive twice": [*tensors, (name, weight)],
        r"becomes \(4, 4\) and not \(512, 256\)": [*without, (name, torch.zeros(4, 4))],
        "up_proj.weight: a weight is nan": [*without, (name, nan)],
        "no place for 'model.layers.1.mlp.up_proj.weight'": [*tensors, ("model.layers.1.mlp.up_proj.weight", weight)],
        r"does not become \(256, 256\)": [("model.layers.0.self_attn.q_proj.weight", torch.zeros(7, 3)), *tensors],
    }


@pytest.mark.parametrize("message", broken_streams(models.tiny_model("llama", num_hidden_layers=1)))
def test_tensors_that_do_not_fit_are_refused(small, tokenizer_dir, tmp_path, message):
    (tmp_path / "a.gguf").write_bytes(b"the old file")
    with pytest.raises(GGUFError, match=message):
        export(small, tokenizer_dir, {tmp_path / "a.gguf": "q8_0"}, broken_streams(small)[message])
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"the old file"


def test_weights_too_large_for_f16_name_the_tensor_and_the_way_out(small, tokenizer_dir, tmp_path):
    tensors = ((name, tensor * 1e7 if "down_proj" in name else tensor) for name, tensor in small.named_parameters())
    with pytest.raises(GGUFError, match=r"down_proj\.weight: a weight is .*\n.*bf16 or f32"):
        export(small, tokenizer_dir, {tmp_path / "a.gguf": "f16"}, tensors)


def test_a_reader_that_fails_leaves_nothing(small, tokenizer_dir, tmp_path):
    def cut_short():
        yield from itertools.islice(small.named_parameters(), 3)
        raise OSError(errno.EIO, "the shard ends here")

    with pytest.raises(SaveError, match="the shard ends here"):
        export(small, tokenizer_dir, {tmp_path / "a.gguf": "q8_0"}, cut_short())
    assert list(tmp_path.iterdir()) == []


def test_each_operation_that_fails_leaves_the_old_file(small, tokenizer_dir, tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    with monkeypatch.context() as patch:
        count = interrupt_at(patch, -1, lambda: None)
        export(small, tokenizer_dir, {path: "q8_0"})
    whole = path.read_bytes()
    for k in range(1, count[0] + 1):
        path.write_bytes(b"the old file")
        with monkeypatch.context() as patch:
            interrupt_at(patch, k, fail_with(errno.ENOSPC))
            with pytest.raises(SaveError, match="fix: free"):
                export(small, tokenizer_dir, {path: "q8_0"})
        assert path.read_bytes() in (b"the old file", whole)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


def test_a_kill_at_each_operation_never_leaves_a_wrong_file(small, tokenizer_dir, tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    with monkeypatch.context() as patch:
        count = interrupt_at(patch, -1, lambda: None)
        export(small, tokenizer_dir, {path: "q8_0"})
    whole = path.read_bytes()
    path.unlink()
    for k in range(1, count[0] + 1):
        assert killed_at(monkeypatch, k, lambda: export(small, tokenizer_dir, {path: "q8_0"}))
        assert not path.exists() or path.read_bytes() == whole
    export(small, tokenizer_dir, {path: "q8_0"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_bytes() == whole


def test_bytes_that_change_on_the_disk_are_noticed(small, tokenizer_dir, tmp_path, monkeypatch):
    from fastllm.gguf import writer

    verify = writer.GGUFWriter.verify

    def verify_after_bit_rot(self):
        with open(self._file.path, "r+b") as file:
            file.seek(-100, 2)
            file.write(b"\x55" * 8)
        verify(self)

    monkeypatch.setattr(writer.GGUFWriter, "verify", verify_after_bit_rot)
    with pytest.raises(GGUFError, match="not the bytes that were written"):
        export(small, tokenizer_dir, {tmp_path / "a.gguf": "q8_0"})
    assert list(tmp_path.iterdir()) == []


def test_hostile_tokenizer_files_raise_our_errors(small, tokenizer_dir, tmp_path):
    good = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    hostile = [
        b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"model": 3}', b'{"model": {}}',
        json.dumps(good | {"model": good["model"] | {"type": "Unigram"}}).encode(),
        json.dumps(good | {"model": good["model"] | {"vocab": {"a": 2**60}}}).encode(),
        json.dumps(good | {"model": good["model"] | {"vocab": {"a": -7}}}).encode(),
        json.dumps(good | {"model": good["model"] | {"vocab": {}}, "added_tokens": []}).encode(),
        json.dumps(good | {"model": good["model"] | {"vocab": {"a": "b"}}}).encode(),
        json.dumps(good | {"model": good["model"] | {"merges": [1]}}).encode(),
        json.dumps(good | {"added_tokens": [{"id": 1}]}).encode(),
        json.dumps(good | {"normalizer": {"type": "Lowercase"}}).encode(),
        json.dumps(good | {"pre_tokenizer": {"type": "Whitespace"}}).encode(),
        json.dumps(good | {"post_processor": {"type": "TemplateProcessing"}}).encode(),
    ]  # fmt: skip
    for content in hostile:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(FastllmError):
            export_plan(small.config.to_dict(), tmp_path, "q8_0")


def test_the_checked_configuration_is_the_text_part():
    text = models.tiny_model("gemma3").config.to_dict()
    architecture, config = architecture_of({"model_type": "gemma3", "hidden_size": 1, "text_config": text})
    assert architecture.name == "gemma3"
    assert config.width == 256
