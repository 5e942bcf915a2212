"""`quantization_method="dynamic_q4_k_m"`: types chosen by what they cost this model, in a file of the usual size."""

import json
import os
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastllm._errors import ArgumentError, DataError
from fastllm.gguf import ExplicitRecipe, GGUFReader
from fastllm.gguf.container import GGUFError
from fastllm.models.calibration import CalibrationData, calibrate, linear_layers, token_chunks

from ..gguf.models import VOCAB_SIZE, save_byte_level_tokenizer, tiny_model
from .checkpoints import adapted, load, log_probs

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(40)
]


def make_base(folder):
    tiny_model("llama", num_hidden_layers=4).to(torch.bfloat16).save_pretrained(folder)
    return save_byte_level_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return adapted(make_base(tmp_path_factory.mktemp("dynamic") / "llama"), bits=4)


def types_of(path) -> dict[str, str]:
    with GGUFReader(path) as reader:
        return {name: info.type.name for name, info in reader.tensors.items()}


def contents_of(path) -> dict[str, bytes]:
    with GGUFReader(path) as reader:
        return {name: reader.data(name).clone().numpy().tobytes() for name in reader.tensors}


# --- calibration ------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_a_plain_pass(trained):
    """E[x^2] against the activations that transformers computes; the adapted model is watched as a whole."""
    model, tokenizer = trained
    data = CalibrationData(CHATS, max_length=64)
    moments = calibrate(model.get_base_model(), tokenizer, data, gradients=True)
    chunks = token_chunks(tokenizer, data, 64)
    assert moments.num_tokens == sum(chunk.shape[1] for chunk in chunks) > 500
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    names = {f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in parts}
    assert moments.inputs.keys() == moments.gradients.keys() == names | {"lm_head.weight"}
    with torch.no_grad():
        outputs = [model(input_ids=chunk.to(model.device), output_hidden_states=True) for chunk in chunks]
    expected = torch.cat([out.hidden_states[-1][0].cpu() for out in outputs]).double().square().mean(0).float()
    torch.testing.assert_close(moments.inputs["lm_head.weight"].cpu(), expected, rtol=1e-4, atol=1e-6)
    assert moments.gradients["model.layers.0.mlp.up_proj.weight"].shape == (512,)
    assert moments.inputs["model.layers.0.mlp.down_proj.weight"].shape == (512,)


def test_gradients_are_the_fisher_information_of_the_head(trained):
    """At the logits, E[g^2] over labels drawn from the model is p (1 - p)."""
    model, tokenizer = trained
    data = CalibrationData(CHATS, max_length=64)
    moments = calibrate(model.get_base_model(), tokenizer, data, gradients=True)
    probabilities = torch.cat([log_probs(model, chunk).exp() for chunk in token_chunks(tokenizer, data, 64)])
    expected = (probabilities * (1 - probabilities)).mean(0).float()
    assert float(moments.gradients["lm_head.weight"].sum() / expected.sum()) == pytest.approx(1, abs=0.05)


def test_scales_are_the_squared_derivatives_by_a_factor_of_the_weight(tmp_path, monkeypatch):
    """d loss / d factor is <W, dloss/dW>, biases left out; here with labels that are known."""
    model = tiny_model("qwen2", num_hidden_layers=2, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    data = CalibrationData(CHATS[:6], max_length=40)
    moments = calibrate(model, tokenizer, data, gradients=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = dict.fromkeys(moments.scales, 0.0)
    for chunk in token_chunks(tokenizer, data, 40):
        logits = plain(input_ids=chunk).logits[0]
        torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
        for name in expected:
            weight = plain.get_parameter(name)
            expected[name] += float((weight.detach() * weight.grad).sum()) ** 2 / moments.num_tokens
        plain.zero_grad()
    for name, value in expected.items():
        assert moments.scales[name].shape == (plain.get_parameter(name).shape[0],)
        assert moments.scales[name].unique().tolist() == pytest.approx([value], rel=1e-3, abs=1e-7)


def test_the_cost_of_an_embedding_is_what_its_rounding_costs(trained):
    """The expected divergence of each type against the one that the model shows, the head and all else exact."""
    from fastllm.gguf.quantizers import quantizer_of
    from fastllm.gguf.sensitivity import embedding_divergences
    from fastllm.gguf.tensor_types import Q3_K, Q5_K

    model, tokenizer = trained
    data = CalibrationData(CHATS, max_length=64)
    importance = calibrate(model.get_base_model(), tokenizer, data, gradients=True).embeddings
    assert list(importance) == ["model.embed_tokens.weight"]
    rows = importance["model.embed_tokens.weight"]
    chunks = token_chunks(tokenizer, data, 64)
    assert set(rows.nonzero().flatten().tolist()) == set(torch.cat(chunks, 1)[0].tolist())
    embedding = model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    expected = embedding_divergences(before, [Q3_K, Q5_K], rows)
    exact = [log_probs(model, chunk) for chunk in chunks]
    for kind in (Q3_K, Q5_K):
        quantizer = quantizer_of(kind)
        with torch.no_grad():
            embedding.weight.copy_(quantizer.decode(quantizer.encode(before.float(), None)))
        found = [(p.exp() * (p - log_probs(model, chunk))).sum(-1) for p, chunk in zip(exact, chunks, strict=True)]
        with torch.no_grad():
            embedding.weight.copy_(before)
        assert expected[kind.name] == pytest.approx(float(torch.cat(found).mean()), rel=0.4)


def test_calibrating_leaves_the_model_as_it_was(trained):
    model, tokenizer = trained
    model.train()
    trained_before = {name for name, p in model.named_parameters() if p.requires_grad}
    calibrate(model.get_base_model(), tokenizer, CalibrationData(CHATS[:4]), gradients=True)
    assert model.training
    assert trained_before == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    hooked = [m for _, m in linear_layers(model.get_base_model()) if m._forward_hooks]
    assert hooked == []


@pytest.mark.parametrize(
    "rows",
    [
        ["When does it open?", "At nine."],
        [{"text": "At nine."}],
        [{"conversations": [{"from": "human", "value": "When?"}, {"from": "gpt", "value": "At nine."}]}],
        [{"instruction": "When does it open?", "output": "At nine."}],
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}],
    ],
)
def test_calibration_data_in_any_form(trained, rows):
    _, tokenizer = trained
    assert token_chunks(tokenizer, CalibrationData(rows), 64)[0].numel() >= 3


def test_calibration_data_that_is_none(trained):
    _, tokenizer = trained
    for rows, error in (
        ("a text", ArgumentError),
        (7, ArgumentError),
        ({"train": CHATS}, ArgumentError),
        ([], DataError),
        ([""], DataError),
    ):
        with pytest.raises(error):
            token_chunks(tokenizer, CalibrationData(rows), 64)
    with pytest.raises(ArgumentError, match="num_samples is 0"):
        token_chunks(tokenizer, CalibrationData(CHATS, num_samples=0), 64)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_dynamic_file_has_the_size_of_its_static_one(judge, trained, tmp_path):
    model, tokenizer = trained
    written = model.save_pretrained_gguf(
        tmp_path / "out", tokenizer, quantization_method=["q4_k_m", "dynamic_q4_k_m"], calibration_dataset=CHATS
    )
    static, dynamic = map(Path, written["gguf_files"])
    assert dynamic.name == "llama.DYNAMIC_Q4_K_M.gguf"
    assert 0.95 * static.stat().st_size < dynamic.stat().st_size <= static.stat().st_size
    assert types_of(static) != types_of(dynamic)
    recipe = json.loads((dynamic.parent / "llama.DYNAMIC_Q4_K_M.recipe.json").read_text())
    assert recipe["notes"]["calibration_tokens"] > 500
    assert recipe["types"].items() <= types_of(dynamic).items()
    matrices = {name for name in types_of(dynamic) if name.endswith("weight") and "norm" not in name}
    assert recipe["types"].keys() == matrices >= {"token_embd.weight", "output.weight", "blk.3.ffn_down.weight"}
    with judge.loaded(dynamic, VOCAB_SIZE) as loaded:
        assert len(loaded.greedy([5, 6, 7], 3)) == 3


def test_a_recipe_is_followed_again_without_data(tmp_path):
    """From its file or as an object; the types are the same, and with the same importance so are the bytes."""
    model, tokenizer = adapted(make_base(tmp_path / "base"))
    first = model.save_pretrained_gguf(
        tmp_path / "a", tokenizer, quantization_method="dynamic_q3_k_m", calibration_dataset=CHATS
    )["gguf_files"][0]
    recipe = str(next(Path(first).parent.glob("*.recipe.json")))
    again = model.save_pretrained_gguf(tmp_path / "b", tokenizer, quantization_method=recipe)["gguf_files"][0]
    assert types_of(again) == types_of(first)
    same = model.save_pretrained_gguf(
        tmp_path / "c", tokenizer, quantization_method=ExplicitRecipe.load(recipe), calibration_dataset=CHATS
    )["gguf_files"][0]
    assert contents_of(same) == contents_of(first)


def test_a_size_of_ones_own(trained, tmp_path):
    model, tokenizer = trained
    by_bits = model.save_pretrained_gguf(tmp_path / "a", tokenizer, target_bpw=5.5, calibration_dataset=CHATS)
    plan = model.export_plan(quantization_method="q4_k_m")
    bits = 8 * (os.path.getsize(by_bits["gguf_files"][0]) - plan.num_bytes) / plan.num_weights + plan.bits_per_weight
    assert 5.2 < bits <= 5.51
    options = {"calibration_dataset": CHATS[:10]}
    by_size = model.save_pretrained_gguf(tmp_path / "b", tokenizer, max_size="2MB", **options)
    assert 1_900_000 < os.path.getsize(by_size["gguf_files"][0]) <= 2_000_000
    with pytest.raises(GGUFError, match="smallest types"):
        model.save_pretrained_gguf(tmp_path / "c", tokenizer, max_size="500KB", **options)
    with pytest.raises(ArgumentError, match="both set the size"):
        model.save_pretrained_gguf(tmp_path / "c", tokenizer, max_size="2MB", target_bpw=5, **options)


def test_calibration_data_makes_an_importance_matrix_for_static_types(trained, tmp_path):
    model, tokenizer = trained
    options = {"quantization_method": ["q4_k_m", "q8_0"]}
    plain = model.save_pretrained_gguf(tmp_path / "a", tokenizer, **options)["gguf_files"]
    weighted = model.save_pretrained_gguf(tmp_path / "b", tokenizer, calibration_dataset=CHATS, **options)["gguf_files"]
    assert types_of(plain[0]) == types_of(weighted[0])
    before, after = contents_of(plain[0]), contents_of(weighted[0])
    changed = {name for name in before if before[name] != after[name]}
    assert {"blk.0.attn_q.weight", "blk.3.ffn_down.weight", "output.weight"} <= changed
    assert "token_embd.weight" not in changed
    assert contents_of(plain[1]) == contents_of(weighted[1])  # Q8_0 takes no importance


def test_an_importance_matrix_of_llama_cpp(trained, tmp_path):
    from fastllm.gguf.architectures import gguf_names
    from fastllm.gguf.importance import SecondMoments

    model, tokenizer = trained
    names, moments = gguf_names(model.config.to_dict()), SecondMoments()
    generator = torch.Generator().manual_seed(0)
    for name, module in linear_layers(model.get_base_model()):
        width = module.in_features
        moments.add(names[f"{name}.weight"][0], torch.rand(64, width, generator=generator))
    moments.save(tmp_path / "imatrix.gguf")
    written = model.save_pretrained_gguf(
        tmp_path / "a", tokenizer, quantization_method="q4_k_m", imatrix_file=tmp_path / "imatrix.gguf"
    )
    plain = model.save_pretrained_gguf(tmp_path / "b", tokenizer, quantization_method="q4_k_m")
    assert contents_of(written["gguf_files"][0]) != contents_of(plain["gguf_files"][0])


def test_a_tied_head_is_measured_as_the_head(tmp_path):
    tiny_model("qwen2", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    written = model.save_pretrained_gguf(
        tmp_path / "out", tokenizer, quantization_method="dynamic_q4_k_m", calibration_dataset=CHATS
    )
    recipe = json.loads(next(Path(written["gguf_directory"]).glob("*.recipe.json")).read_text())
    assert recipe["types"]["token_embd.weight"] in ("Q5_K", "Q6_K", "Q8_0")


def library_text(num_characters: int) -> str:
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) > num_characters:
            return text[:num_characters]
    raise AssertionError("not enough text")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3moe"])
def test_on_a_model_with_skill_llama_cpp_finds_dynamic_types_better(judge, tmp_path, family):
    """Trained on Python sources, each size exported statically and dynamically with the same importance: on held-out
    text at most 0.85 of the divergence, 0.70 on average, in the mean and in the worst percent of 1,000 predictions.

    Fewer say nothing of that percent, which is one or two predictions of 150."""
    text = library_text(1_200_000)
    tiny_model(family, num_hidden_layers=6).save_pretrained(tmp_path / "base")
    save_byte_level_tokenizer(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", full_finetuning=True, dtype=torch.float32)
    train(model, encoded(tokenizer, text[:1_000_000]), steps=400)
    sizes = ["q3_k_m", "q4_k_m", "q5_k_m"]
    written = model.save_pretrained_gguf(
        tmp_path / "out", tokenizer, quantization_method=[*sizes, *(f"dynamic_{size}" for size in sizes)],
        calibration_dataset=[text[1_000_000:1_060_000]], max_seq_length=128,
    )  # fmt: skip
    held_out = encoded(tokenizer, text[1_150_000:])
    prompts = held_out.unfold(0, 48, (len(held_out) - 48) // 999)[:1000]
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(input_ids=batch).logits[:, -1].double() for batch in prompts.split(50)])
    found = [divergences(judge, expected.log_softmax(-1), path, prompts) for path in written["gguf_files"]]
    means, tails = [], []
    for size, static, dynamic in zip(sizes, found[:3], found[3:], strict=True):
        means.append(float(dynamic.mean() / static.mean()))
        tails.append(float(dynamic.quantile(0.99) / static.quantile(0.99)))
        print(
            f"{family}, {size}: static {float(static.mean()):.2e}, dynamic {means[-1]:.2f} of it, 99 % {tails[-1]:.2f}"
        )
    for ratios in (means, tails):
        assert max(ratios) <= 0.85
        assert sum(ratios) / len(ratios) <= 0.70


def encoded(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def train(model, ids: torch.Tensor, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    torch.manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (8,))
        rows = torch.stack([ids[start : start + 64] for start in starts])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def divergences(judge, expected: torch.Tensor, path, prompts: torch.Tensor) -> torch.Tensor:
    """KL(expected || llama.cpp) of the token after each prompt; `expected` holds log-probabilities."""
    with judge.loaded(path, VOCAB_SIZE) as loaded:
        got = torch.stack([torch.from_numpy(loaded.next_token_logprobs(prompt.tolist())) for prompt in prompts])
    return (expected.exp() * (expected - got.double())).sum(-1)
