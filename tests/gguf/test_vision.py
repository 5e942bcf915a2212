"""Vision-language models, judged by llama.cpp: for an image and a question it predicts what transformers does."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from fastllm._errors import ModelError, UnsupportedError
from fastllm.gguf import GGUFReader, export_gguf, export_plan, mmproj_plan, write_lora_gguf
from fastllm.gguf import export as export_module
from fastllm.gguf.architectures import architecture_of, projectors
from fastllm.gguf.container import GGUFError
from fastllm.gguf.export import canonical_name
from fastllm.gguf.quantizers import quantizer_of

from . import vision_models
from .vision_models import FAMILIES, QUESTION, VOCAB_SIZE, inputs_of, logprobs, make_processor, picture

# Largest divergence in each type: some 5 times what was measured of the four families.
LIMITS = {"f32": 1e-4, "f16": 1e-4, "bf16": 2e-3, "q8_0": 0.015}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def made(family, tmp_path_factory):
    """(model, processor, folder of the tokenizer) of the family."""
    folder = tmp_path_factory.mktemp(family)
    processor = make_processor(family, folder)
    return vision_models.tiny_vision_model(family, processor), processor, folder


def export(made, folder, kind="f32", *, tensors=None, config=None, **options):
    """Write both files. Returns their paths."""
    model, processor, tokenizer_dir = made
    path, mmproj = folder / "model.gguf", folder / "mmproj.gguf"
    export_gguf(
        {path: "f32"},
        config=config or model.config.to_dict(),
        tokenizer_dir=tokenizer_dir,
        tensors=model.named_parameters() if tensors is None else tensors,
        mmproj={mmproj: kind},
        image_processor=processor.image_processor.to_dict(),
        **options,
    )
    return path, mmproj


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


def divergence(judge, family, made, paths, image) -> float:
    """KL(transformers || llama.cpp) of the next token after the image and the question."""
    model, processor, _ = made
    expected = logprobs(model, inputs_of(family, processor, image))
    with judge.loaded(paths[0], VOCAB_SIZE, mmproj=paths[1]) as loaded:
        return kl(expected, torch.from_numpy(loaded.image_logprobs(image, QUESTION)).double())


@pytest.mark.parametrize("kind", LIMITS)
def test_log_probabilities_are_those_of_transformers(judge, family, made, tmp_path, kind):
    image = picture(family)
    assert abs(divergence(judge, family, made, export(made, tmp_path, kind), image)) < LIMITS[kind]


def test_the_answer_depends_on_the_image(family, made):
    """Otherwise the tests here would show nothing."""
    model, processor, _ = made
    first, second = (logprobs(model, inputs_of(family, processor, picture(family, seed))) for seed in (0, 1))
    assert kl(first, second) > 0.3


def test_the_greedy_answer_is_that_of_transformers(judge, family, made, tmp_path):
    """Tokens behind an image stand where transformers has them."""
    model, processor, _ = made
    image = picture(family, seed=1)
    inputs = inputs_of(family, processor, image)
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=2)
    path, mmproj = export(made, tmp_path)
    with judge.loaded(path, VOCAB_SIZE, mmproj=mmproj) as loaded:
        assert loaded.image_prompt_tokens(image, QUESTION) == inputs["input_ids"].shape[1]
        assert loaded.image_answer(image, QUESTION, 8) == answer[0, inputs["input_ids"].shape[1] :].tolist()


def test_names_and_keys_are_those_of_the_format(family, made):
    """By the tables of the `gguf` package."""
    model, processor, _ = made
    plan = mmproj_plan(model.config.to_dict(), processor.image_processor.to_dict())
    known = gguf.constants.Keys.ClipVision, gguf.constants.Keys.ClipVision.Attention, gguf.constants.Keys.Clip
    keys = {value for table in known for value in vars(table).values()} | {"clip.vision.projector.scale_factor"}
    assert {key for key in plan.metadata if key.startswith("clip.")} <= keys
    assert plan.metadata["general.type"] == gguf.GGUFType.MMPROJ
    assert plan.metadata["clip.projector_type"] in vars(gguf.constants.VisionProjectorType).values()
    expected = {gguf.TENSOR_NAMES[name] for name in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.MMPROJ]}
    for name in plan.layout.shapes:
        stem = name.removesuffix(".1").rsplit(".", 1)[0]
        assert any(stem == entry.format(bid=bid) for entry in expected for bid in range(4)), name


def test_types_of_a_file(family, made):
    model, processor, _ = made
    config, settings = model.config.to_dict(), processor.image_processor.to_dict()
    for kind in LIMITS:
        for info in mmproj_plan(config, settings, kind).tensors:
            if len(info.shape) == 1 or "position" in info.name or kind == "f32":
                assert info.type.name == "F32", info.name
            elif "patch_embd" in info.name or info.name == "mm.input_projection.weight":
                assert info.type.name == "F16", info.name
            else:
                assert info.type.name == kind.upper(), info.name


def test_the_plan_knows_the_size_to_the_byte(family, made, tmp_path):
    model, processor, folder = made
    path, mmproj = export(made, tmp_path, "q8_0")
    plan = mmproj_plan(model.config.to_dict(), processor.image_processor.to_dict(), "q8_0")
    assert mmproj.stat().st_size == plan.num_bytes
    assert path.stat().st_size == export_plan(model.config.to_dict(), folder, "f32").num_bytes
    assert plan.describe().startswith(f"clip, q8_0: {plan.num_bytes:,} bytes")


def test_tensors_by_any_of_their_names(family, made, tmp_path):
    """As transformers wrote them before version 5, and as a live model has them."""
    model, _, _ = made
    paths = export(made, tmp_path)
    written = [path.read_bytes() for path in paths]
    older = [(vision_models.older_name(family, name), tensor) for name, tensor in model.named_parameters()]
    assert older[0][0] != next(model.named_parameters())[0]
    export(made, tmp_path, tensors=older)
    assert [path.read_bytes() for path in paths] == written


def test_a_tied_head_is_the_embedding(judge, tmp_path):
    """Where the configuration of the whole model says so and that of its text does not, as in Qwen2.5-VL 3B."""
    processor = make_processor("qwen2_5_vl", tmp_path)
    model = vision_models.tiny_vision_model("qwen2_5_vl", processor, tie_word_embeddings=True)
    assert model.config.to_dict()["text_config"].get("tie_word_embeddings") is not True
    paths = export((model, processor, tmp_path), tmp_path)
    with GGUFReader(paths[0]) as reader:
        assert "output.weight" not in reader.tensors
    found = divergence(judge, "qwen2_5_vl", (model, processor, tmp_path), paths, picture("qwen2_5_vl"))
    assert abs(found) < LIMITS["f32"]


def test_every_value_is_in_the_file(family, made, tmp_path):
    """Each number of the checkpoint's vision part is found once in the file."""
    model, _, _ = made
    _, mmproj = export(made, tmp_path)
    with GGUFReader(mmproj) as reader:
        tensors = [quantizer_of(i.type).decode(reader.data(n)).flatten() for n, i in reader.tensors.items()]
    sources = [
        (p + 1 if "soft_emb_norm" in name else p).detach().flatten()
        for name, p in model.named_parameters() if ".visual." in name or "vision_tower" in name or "projector" in name
    ]  # fmt: skip
    assert torch.equal(torch.cat(tensors).sort().values, torch.cat(sources).sort().values)


@pytest.mark.parametrize(
    ("family", "name", "broken"),
    [
        # value, query and key in the places of query, key and value
        ("qwen2_vl", "_rows", lambda start, stop: lambda tensor: tensor.roll(64, 0)[start:stop]),
        ("gemma3", "plus_one", lambda tensor: tensor),
    ],
    indirect=["family"],
)
def test_the_judge_notices_a_wrong_transform(judge, family, made, tmp_path, monkeypatch, name, broken):
    monkeypatch.setattr(projectors, name, broken)
    assert divergence(judge, family, made, export(made, tmp_path), picture(family)) > 10 * LIMITS["f32"]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen2_vl", "qwen2vl.rope.dimension_sections", [6, 6, 4, 0]),
        ("qwen2_vl", "clip.vision.image_std", [0.3, 0.2, 0.25]),
        ("qwen2_5_vl", "clip.vision.n_wa_pattern", 4),
        ("qwen3_vl", "qwen3vl.rope.dimension_sections", [12, 2, 2, 0]),
        ("gemma3", "clip.vision.image_mean", [0.3, 0.4, 0.5]),
        ("gemma3", "clip.vision.attention.layer_norm_epsilon", 1.0),
    ],
    indirect=["family"],
)
def test_the_judge_notices_a_wrong_key(judge, family, made, tmp_path, monkeypatch, key, value):
    name = "mmproj_plan" if key.startswith("clip.") else "export_plan"
    planned = getattr(export_module, name)

    def plan_with_wrong_key(*args, **options):
        plan = planned(*args, **options)
        assert key in plan.metadata
        plan.metadata[key] = value
        return plan

    monkeypatch.setattr(export_module, name, plan_with_wrong_key)
    assert divergence(judge, family, made, export(made, tmp_path), picture(family)) > 10 * LIMITS["f32"]


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_the_judge_notices_deepstack_features_of_another_layer(judge, family, made, tmp_path):
    config = made[0].config.to_dict()
    config["vision_config"] = {**config["vision_config"], "deepstack_visual_indexes": [1, 2]}
    assert divergence(judge, family, made, export(made, tmp_path, config=config), picture(family)) > 10 * LIMITS["f32"]


@pytest.mark.parametrize(
    ("family", "setting", "value", "message"),
    [
        ("qwen2_vl", "hidden_act", "gelu", "computes quick_gelu"),
        ("qwen2_vl", "spatial_merge_size", 4, "2 by 2"),
        ("qwen2_vl", "temporal_patch_size", 1, "two kernels"),
        ("qwen2_5_vl", "window_size", 56, "112 pixels"),
        ("qwen2_5_vl", "fullatt_block_indexes", [0, 3], "one layer of 1, here"),
        ("gemma3", "vision_use_head", True, "pooling head"),
        ("gemma3", "image_size", 98, "7 patches a side are not pooled to 4"),
        ("gemma3", "model_type", "clip_vision_model", "SigLIP"),
    ],
    indirect=["family"],
)
def test_what_llama_cpp_would_get_wrong_is_refused(family, made, setting, value, message):
    model, processor, _ = made
    config = model.config.to_dict()
    config["vision_config"] = {**config["vision_config"], setting: value}
    with pytest.raises(UnsupportedError, match=message):
        mmproj_plan(config, processor.image_processor.to_dict())


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"do_rescale": False}, UnsupportedError, "do_rescale"),
        ({"rescale_factor": 1.0}, UnsupportedError, "rescale_factor"),
        ({"image_mean": None}, ModelError, "image_mean"),
        ({"image_std": [1.0]}, ModelError, "image_std"),
    ],
)
def test_an_image_processor_that_differs_is_refused(family, made, settings, error, message):
    model, processor, _ = made
    with pytest.raises(error, match=message):
        mmproj_plan(model.config.to_dict(), processor.image_processor.to_dict() | settings)


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_other_requests_that_can_not_be_served(family, made, tmp_path):
    model, processor, _ = made
    config, settings = model.config.to_dict(), processor.image_processor.to_dict()
    with pytest.raises(UnsupportedError, match=r"not stored as 'q4_k_m'[\s\S]*f32, f16, bf16, q8_0"):
        mmproj_plan(config, settings, "q4_k_m")
    assert mmproj_plan(config, settings, "BF16").quantization == "bf16"
    with pytest.raises(UnsupportedError, match="no vision tower"):
        mmproj_plan(config["text_config"], settings)
    with pytest.raises(UnsupportedError, match="the vision tower of 'gemma9'"):
        mmproj_plan({**config, "model_type": "gemma9"}, settings)
    with pytest.raises(GGUFError, match=r"1 of \d+ tensors are missing or not whole: v.post_ln.bias"):
        export(made, tmp_path, tensors=[(n, p) for n, p in model.named_parameters() if "post_layernorm.bias" not in n])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_sizes_of_images_that_differ_are_told(family, made, capsys):
    from fastllm._notices import forget_notices

    model, processor, _ = made
    forget_notices()
    settings = processor.image_processor.to_dict()
    mmproj_plan(model.config.to_dict(), settings)
    assert "8 to 64 tokens, llama.cpp 8 to 4096: run it with --image-min-tokens 8 --image-max-tokens 64" in (
        capsys.readouterr().out
    )
    mmproj_plan(model.config.to_dict(), settings | {"size": {"shortest_edge": 8 * 784, "longest_edge": 4096 * 784}})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_an_adapter_file_holds_no_vision_part(family, made, tmp_path):
    model, _, _ = made
    factors = {
        f"base_model.model.model.visual.blocks.0.attn.proj.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    with pytest.raises(UnsupportedError, match=r"changes the vision part[\s\S]*finetune_vision_layers=False"):
        write_lora_gguf(
            tmp_path / "lora.gguf",
            config=model.config.to_dict(),
            adapter_config={"r": 4, "lora_alpha": 8},
            tensors=factors.items(),
        )


# What the published configurations say, as they are written by versions of transformers before 5.
PUBLISHED = {
    "Qwen2-VL 2B": {
        "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    },
    "Qwen2.5-VL 7B": {
        "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "vocab_size": 152064,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                          "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
                          "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                          "tokens_per_second": 2, "temporal_patch_size": 2},
    },
    "Qwen3-VL 4B": {
        "model_type": "qwen3_vl", "tie_word_embeddings": True,
        "text_config": {"model_type": "qwen3_vl_text", "hidden_size": 2560, "intermediate_size": 9728,
                        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                        "max_position_embeddings": 262144, "vocab_size": 151936, "rms_norm_eps": 1e-6,
                        "rope_theta": 5000000, "hidden_act": "silu", "attention_bias": False,
                        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                                         "rope_type": "default"}},
        "vision_config": {"model_type": "qwen3_vl", "depth": 24, "hidden_act": "gelu_pytorch_tanh",
                          "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3,
                          "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
                          "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
    },
    "Gemma 3 4B": {
        "model_type": "gemma3", "mm_tokens_per_image": 256,
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                        "sliding_window": 1024, "vocab_size": 262208, "max_position_embeddings": 131072,
                        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896,
                          "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
                          "patch_size": 14, "vision_use_head": False},
    },
}  # fmt: skip
PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Every tensor of the model has one place, in the language model's file or in the tower's."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    architecture, text = architecture_of(config)
    layouts = architecture.layout(text), mmproj_plan(config, PIXELS, "q8_0").layout
    tied = {"lm_head.weight"} if "lm_head.weight" not in layouts[0].targets else set()
    for source, tensor in model.state_dict().items():
        canonical = canonical_name(source)
        places = [layout.targets[canonical] for layout in layouts if canonical in layout.targets]
        assert len(places) == (canonical not in tied), source
        for target in places[0] if places else ():
            shapes = layouts[0].shapes | layouts[1].shapes
            assert tuple(target.change(tensor).shape) == shapes[target.name], source
    sources = {canonical_name(source) for source in model.state_dict()}
    assert {source for layout in layouts for source in layout.targets} <= sources


def test_keys_of_published_models():
    """As llama.cpp's own converter derives them."""
    keys = {name: mmproj_plan(config, PIXELS).metadata for name, config in PUBLISHED.items()}
    assert keys["Qwen2.5-VL 7B"]["clip.vision.n_wa_pattern"] == 8
    assert keys["Qwen2.5-VL 7B"]["clip.vision.projection_dim"] == 3584
    assert keys["Qwen2-VL 2B"]["clip.vision.embedding_length"] == 1280
    assert keys["Qwen3-VL 4B"]["clip.vision.image_size"] == 768
    assert keys["Gemma 3 4B"]["clip.vision.projector.scale_factor"] == 4
    stacked = keys["Qwen3-VL 4B"]["clip.vision.is_deepstack_layers"]
    assert [layer for layer, is_stacked in enumerate(stacked) if is_stacked] == [5, 11, 17]
    architecture, text = architecture_of(PUBLISHED["Qwen3-VL 4B"])
    assert architecture.metadata(text)["qwen3vl.n_deepstack_layers"] == 3
    assert architecture.metadata(text)["qwen3vl.rope.dimension_sections"] == [24, 20, 20, 0]


def test_parts_of_an_image_that_llama_cpp_does_not_cut_are_told(capsys):
    from fastllm._notices import forget_notices

    forget_notices()
    mmproj_plan(PUBLISHED["Gemma 3 4B"], {**PIXELS, "do_pan_and_scan": True})
    assert "without the parts of do_pan_and_scan" in capsys.readouterr().out


def test_rows_that_hold_no_whole_blocks_are_f16_and_told(capsys):
    from fastllm._notices import forget_notices

    forget_notices()
    plan = mmproj_plan(PUBLISHED["Gemma 3 4B"], PIXELS, "q8_0")
    kinds = {info.name: info.type.name for info in plan.tensors}
    assert kinds["v.blk.3.ffn_down.weight"] == "F16"
    assert kinds["v.blk.3.ffn_up.weight"] == "Q8_0"
    assert "rows of 27 tensors do not hold whole blocks: v.blk.0.ffn_down.weight Q8_0 -> F16" in capsys.readouterr().out
