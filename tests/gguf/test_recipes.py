"""Types per tensor: those of llama-quantize for its mixes, those of the file for an explicit recipe."""

import json
from pathlib import Path

import pytest

from fastllm._errors import UnsupportedError
from fastllm.gguf.container import GGUFError
from fastllm.gguf.recipes import (
    STATIC_MIXES,
    ExplicitRecipe,
    ModelShape,
    choose_types,
    fitting_type,
    may_quantize,
    static_mix,
)
from fastllm.gguf.tensor_types import F16, F32, Q4_K, Q5_0, Q6_K, Q8_0

GOLDEN = json.loads((Path(__file__).parent / "data" / "llama_quantize_types.json").read_text())["models"]
LLAMA = ModelShape("llama", num_layers=16, num_heads=32, num_kv_heads=8)
TENSORS = [
    ("token_embd.weight", (1024, 512)),
    ("output_norm.weight", (512,)),
    ("output.weight", (1024, 512)),
    *(
        (f"blk.{layer}.{name}.weight", shape)
        for layer in range(16)
        for name, shape in {"attn_norm": (512,), "attn_v": (128, 512), "ffn_down": (512, 1024)}.items()
    ),
]


def tensors_of(model: dict) -> list[tuple[str, tuple[int, ...]]]:
    layers = range(model["num_layers"])
    in_layers = [(f"blk.{i}.{name}", tuple(shape)) for i in layers for name, shape in model["layer"].items()]
    return [(name, tuple(shape)) for name, shape in model["outer"].items()] + in_layers


def spelled_out(model: dict, types: dict[str, str]) -> dict[str, str]:
    """Types by tensor name, of the run-length lists in the golden file."""
    expected = {}
    for name, text in types.items():
        if name in model["outer"]:
            expected[name] = text
            continue
        kinds = [kind for run in text.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]
        expected.update({f"blk.{layer}.{name}": kind for layer, kind in enumerate(kinds)})
    return expected


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("mix", STATIC_MIXES)
def test_static_mixes_are_those_of_llama_quantize(name, mix):
    model = GOLDEN[name]
    shape = ModelShape(
        *(model[key] for key in ("architecture", "num_layers", "num_heads", "num_kv_heads", "num_experts"))
    )
    tensors = tensors_of(model)
    chosen = choose_types(static_mix(mix), tensors, shape)
    expected = {tensor: "F32" for tensor, _ in tensors} | spelled_out(model, model["types"][mix])
    assert {tensor: kind.name for tensor, kind in chosen.items()} == expected


def test_every_mix_is_in_the_golden_file():
    assert set(STATIC_MIXES) == set(GOLDEN["Llama 3.1 8B"]["types"])


@pytest.mark.parametrize(
    ("mix", "without", "with_importance"),
    [("q4_0", "Q4_0", "Q4_1"), ("q5_0", "Q5_0", "Q5_1"), ("iq4_nl", "Q5_K", "IQ4_NL"), ("iq4_xs", "Q5_K", "IQ4_XS")],
)
def test_an_importance_matrix_changes_the_first_ffn_down(mix, without, with_importance):
    for has_importance, kind in ((False, without), (True, with_importance)):
        chosen = choose_types(static_mix(mix), TENSORS, LLAMA, has_importance)
        assert [chosen[f"blk.{layer}.ffn_down.weight"].name for layer in (0, 1)] == [kind, kind]
        assert chosen["blk.2.ffn_down.weight"].name == mix.upper()


def test_the_value_heads_of_a_72b_qwen2_get_more_bits():
    """As those of a Llama 70B; llama.cpp infers the size where it loads the model, not in its mix rules."""
    model = ModelShape("qwen2", num_layers=80, num_heads=64, num_kv_heads=8)
    chosen = choose_types(static_mix("q4_k_s"), [("blk.40.attn_v.weight", (1024, 8192))], model)
    assert chosen["blk.40.attn_v.weight"].name == "Q5_K"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("quantized", "q4_k_m"),
        ("fast_quantized", "q8_0"),
        ("Q4_K_M", "q4_k_m"),
        ("q4-k-m", "q4_k_m"),
        ("q4_k", "q4_k_m"),
        ("q5_k", "q5_k_m"),
        ("not_quantized", "f16"),
    ],
)
def test_aliases(alias, name):
    assert static_mix(alias).name == name


def test_not_quantized_keeps_the_16_bit_type_of_the_model():
    assert static_mix("not_quantized", "bfloat16").name == "bf16"
    assert static_mix("not_quantized", "float32").name == "f16"


@pytest.mark.parametrize("name", ["q4_k_x", "iq2_xxs", "Q4_NL", ""])
def test_unknown_methods_are_refused_with_the_known_ones(name):
    with pytest.raises(UnsupportedError, match="iq4_nl"):
        static_mix(name)


def test_norms_biases_and_routers_are_not_quantized():
    assert may_quantize("blk.0.attn_q.weight", (64, 64))
    assert may_quantize("blk.0.ffn_up_exps.weight", (4, 64, 64))
    for name, shape in {
        "blk.0.attn_norm.weight": (64, 64),
        "blk.0.attn_q.bias": (64, 64),
        "blk.0.ffn_gate_inp.weight": (4, 64),
        "rope_freqs.weight": (32,),
        "blk.0.attn_k.weight": (1, 64),  # ggml drops leading ones: one row is a vector
    }.items():
        assert not may_quantize(name, shape)


def test_rows_that_do_not_hold_whole_blocks_get_the_type_of_llama_cpp():
    assert fitting_type(Q4_K, 512) is Q4_K
    assert fitting_type(Q4_K, 96) is Q5_0
    assert fitting_type(Q6_K, 96) is Q8_0
    assert fitting_type(Q4_K, 100) is F16
    assert fitting_type(Q8_0, 100) is F16
    assert fitting_type(F32, 7) is F32


def test_an_explicit_recipe_names_what_differs_from_its_base(tmp_path):
    recipe = ExplicitRecipe("mine", "q4_k_m", {"blk.3.ffn_down.weight": "Q8_0"}, {"bits_per_weight": 4.9})
    recipe.save(tmp_path / "recipe.json")
    assert ExplicitRecipe.load(tmp_path / "recipe.json") == recipe
    chosen = choose_types(recipe, TENSORS, LLAMA)
    base = choose_types(static_mix("q4_k_m"), TENSORS, LLAMA)
    assert {name for name in chosen if chosen[name] is not base[name]} == {"blk.3.ffn_down.weight"}
    assert chosen["blk.3.ffn_down.weight"] is Q8_0
    assert chosen["output.weight"] is Q6_K


def test_recipes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(GGUFError, match=r"did you mean 'blk\.3\.ffn_down\.weight'"):
        choose_types(ExplicitRecipe("mine", "q4_k_m", {"blk.3.fn_down.weight": "Q8_0"}), TENSORS, LLAMA)
    with pytest.raises(UnsupportedError, match="Q4_K"):
        ExplicitRecipe("mine", "q4_k_m", {"output.weight": "q4_kk"})
    for content in ("[]", "{", '{"name": "a", "base": "q4_k_m", "types": 3}', '{"types": {"a": 1}}', "\xff"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(GGUFError, match="not a recipe"):
            ExplicitRecipe.load(tmp_path / "bad.json")


def test_16_bit_recipes_keep_16_bits_everywhere():
    for mix in ("f16", "bf16", "f32"):
        chosen = choose_types(static_mix(mix), TENSORS, LLAMA)
        assert {chosen[name].name for name, shape in TENSORS if len(shape) > 1} == {mix.upper()}
        assert {chosen[name] for name, shape in TENSORS if len(shape) == 1} == {F32}
    assert F16.bits_per_weight == 16
