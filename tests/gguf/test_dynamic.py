"""Importance, sensitivity and allocation: the arithmetic against brute force, the whole on a model trained here."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from fastllm._errors import ArgumentError, UnsupportedError
from fastllm.gguf import export_gguf, export_plan
from fastllm.gguf.allocation import allocate_types
from fastllm.gguf.architectures import gguf_names
from fastllm.gguf.container import GGUFError
from fastllm.gguf.dynamic import candidates, dynamic_base, dynamic_recipe
from fastllm.gguf.importance import SecondMoments, load_imatrix
from fastllm.gguf.quantizers import quantizer_of, regaining_factor
from fastllm.gguf.sensitivity import expected_divergences
from fastllm.gguf.tensor_types import IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, tensor_type

from . import models


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return models.save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# --- importance ------------------------------------------------------------------------------------------------------


def test_second_moments_of_batches_are_those_of_all_rows():
    rows = torch.randn(100, 16)
    moments = SecondMoments()
    for batch in rows.split(33):
        moments.add(("q", "k"), batch.view(1, -1, 16))
        moments.add("down", batch.half())
    means = moments.means()
    assert torch.allclose(means["q"], rows.square().mean(0))
    assert means["q"] is means["k"]
    assert torch.allclose(means["down"], rows.half().float().square().mean(0))


def test_each_expert_has_its_own_moments_and_rare_ones_those_of_the_layer():
    rows, experts = torch.randn(300, 8), torch.tensor([0, 1, 1] * 99 + [2] * 3)
    moments = SecondMoments()
    for batch, ids in zip(rows.split(77), experts.split(77), strict=True):
        moments.add("up", batch, experts=ids, num_experts=4)
    means = moments.means(min_tokens=32)["up"]
    for expert in (0, 1):
        assert torch.allclose(means[expert], rows[experts == expert].square().mean(0))
    for rare in (2, 3):  # three tokens, none
        assert torch.allclose(means[rare], rows.square().mean(0))


def test_values_that_are_not_finite_or_do_not_fit_are_refused():
    moments = SecondMoments()
    moments.add("q", torch.ones(3, 4))
    with pytest.raises(GGUFError, match="not finite"):
        moments.add("q", torch.tensor([[1.0, 2.0, float("nan"), 0.0]]))
    with pytest.raises(GGUFError, match="columns"):
        moments.add("q", torch.ones(3, 5))


def test_an_imatrix_file_is_llama_cpps(tmp_path):
    moments = SecondMoments()
    rows = torch.randn(1024, 32)
    moments.add("blk.0.attn_q.weight", rows)
    moments.add("blk.0.ffn_up_exps.weight", rows, experts=torch.arange(1024) % 3, num_experts=4)
    moments.save(tmp_path / "imatrix.gguf", chunk_size=256)
    assert all(torch.allclose(load_imatrix(tmp_path / "imatrix.gguf")[k], v) for k, v in moments.means().items())
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    shapes = {tensor.name: list(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == [32, 4]
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == [1, 4]


def test_another_gguf_file_is_no_imatrix(tokenizer_dir, tmp_path):
    model = models.tiny_model("llama", num_hidden_layers=1)
    path = tmp_path / "a.gguf"
    export_gguf(
        {path: "f16"}, config=model.config.to_dict(), tokenizer_dir=tokenizer_dir, tensors=model.named_parameters()
    )
    with pytest.raises(GGUFError, match="not an imatrix"):
        load_imatrix(path)


# --- sensitivity -----------------------------------------------------------------------------------------------------


def test_the_expected_divergence_is_the_weighted_squared_change():
    weight, columns, rows = torch.randn(64, 256), torch.rand(256), torch.rand(64)
    found = expected_divergences(weight, [Q4_K, Q6_K], importance=columns, output_importance=rows, sampled_rows=64)
    for kind in (Q4_K, Q6_K):
        quantizer = quantizer_of(kind)
        factor = regaining_factor(quantizer, weight, columns)
        change = quantizer.decode(quantizer.encode(weight, columns, factor=factor)) - weight
        assert found[kind.name] == pytest.approx(float(0.5 * rows @ change.square() @ columns), rel=1e-5)
    sampled = expected_divergences(weight, [Q4_K], importance=columns, output_importance=rows, sampled_rows=16)
    assert sampled["Q4_K"] == pytest.approx(found["Q4_K"], rel=0.2)


@pytest.mark.parametrize("kind", [Q2_K, Q3_K, Q4_K, Q5_K, IQ4_XS])
@pytest.mark.parametrize("columns", [None, torch.linspace(0.1, 2, 256)])
def test_codes_of_least_squares_shrink_a_weight_and_the_factor_gives_it_back(kind, columns):
    """They are smaller by their relative squared error; as large as the weight, they have hardly more of it."""
    weight, quantizer = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), quantizer_of(kind)
    weighted = weight if columns is None else weight * columns

    def shrunk_and_error(factor: float) -> tuple[float, float]:
        change = quantizer.decode(quantizer.encode(weight, columns, factor=factor)) - weight
        energy = (weighted * weight).sum()
        error = (change.square() * (1 if columns is None else columns)).sum() / energy
        return float(-(weighted * change).sum() / energy), float(error)

    shrunk, least = shrunk_and_error(1.0)
    left, error = shrunk_and_error(regaining_factor(quantizer, weight, columns))
    assert shrunk == pytest.approx(least, rel=0.3)
    assert abs(left) < 0.05 * shrunk
    assert error < least * (1 + 2 * shrunk)


def test_types_that_do_not_shrink_keep_their_bytes():
    assert regaining_factor(quantizer_of(Q6_K), torch.randn(4, 256), None) == 1
    assert regaining_factor(quantizer_of(Q4_K), torch.zeros(4, 256), None) == 1


def test_what_is_shrunk_costs_by_its_square():
    weight, quantizer = torch.randn(64, 256), quantizer_of(Q6_K)
    plain = expected_divergences(weight, [Q6_K], sampled_rows=64)["Q6_K"]
    found = expected_divergences(weight, [Q6_K], scale_importance=torch.tensor(1e10), sampled_rows=64)["Q6_K"]
    change = quantizer.decode(quantizer.encode(weight)) - weight
    shrunk = float((change * weight).sum() / weight.square().sum())
    assert found - plain == pytest.approx(0.5e10 * shrunk**2, rel=0.02)


def test_the_expected_divergence_of_experts_is_their_sum():
    weight, columns = torch.randn(3, 32, 256), torch.rand(3, 256)
    whole = expected_divergences(weight, [Q4_K], importance=columns, sampled_rows=96)["Q4_K"]
    parts = [expected_divergences(weight[i], [Q4_K], importance=columns[i], sampled_rows=32)["Q4_K"] for i in range(3)]
    assert whole == pytest.approx(sum(parts))


# --- allocation ------------------------------------------------------------------------------------------------------


def random_problem(seed: int, num_tensors: int = 6):
    generator = random.Random(seed)
    costs, sizes = {}, {}
    for i in range(num_tensors):
        weights, scale = generator.randint(10, 1000), 10 ** generator.uniform(-3, 1)
        bits = {"Q2": 2.6, "Q3": 3.4, "Q4": 4.5, "Q5": 5.5, "Q6": 6.6, "Q8": 8.5}
        costs[f"t{i}"] = {kind: scale * weights * 4**-b * generator.uniform(0.5, 2) for kind, b in bits.items()}
        sizes[f"t{i}"] = {kind: int(weights * b) for kind, b in bits.items()}
    return costs, sizes


def total(table, types):
    return sum(table[name][kind] for name, kind in types.items())


def lower_bound(costs, sizes, budget: int) -> float:
    """What no allocation can beat: the maximum of the Lagrange dual, over prices of a byte on a fine grid."""
    prices = (10 ** (exponent / 50) for exponent in range(-400, 200))
    return max(
        sum(min(costs[name][kind] + price * sizes[name][kind] for kind in costs[name]) for name in costs)
        - price * budget
        for price in prices
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_allocation_is_optimal_but_for_one_step(seed):
    costs, sizes = random_problem(seed)
    smallest, largest = (sum(pick(size.values()) for size in sizes.values()) for pick in (min, max))
    for fraction in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = int(smallest + fraction * (largest - smallest))
        types = allocate_types(costs, sizes, budget)
        assert total(sizes, types) <= budget
        step = max(max(cost.values()) - min(cost.values()) for cost in costs.values())
        assert total(costs, types) <= lower_bound(costs, sizes, budget) + step


@pytest.mark.parametrize("num_tensors", [200, 1000])
def test_the_allocation_of_a_real_number_of_tensors_is_optimal_to_two_percent(num_tensors):
    for seed in range(3):
        costs, sizes = random_problem(seed, num_tensors)
        budget = sum(size["Q4"] for size in sizes.values())
        types = allocate_types(costs, sizes, budget)
        assert 0.999 * budget < total(sizes, types) <= budget
        assert total(costs, types) <= 1.02 * lower_bound(costs, sizes, budget)


def test_tied_tensors_get_one_type_and_no_type_beyond_the_given_ones():
    costs, sizes = random_problem(1)
    del costs["t5"]["Q2"], sizes["t4"]["Q8"]
    budget = sum(size["Q4"] for size in sizes.values())
    types = allocate_types(costs, sizes, budget, tied=[("t0", "t1"), ("t4", "t5")])
    assert types["t0"] == types["t1"]
    assert types["t4"] == types["t5"]
    assert types["t5"] not in ("Q2", "Q8")


def test_a_budget_that_is_too_small_is_refused():
    costs, sizes = random_problem(1)
    with pytest.raises(GGUFError, match="smallest types need"):
        allocate_types(costs, sizes, 10)


# --- recipes ---------------------------------------------------------------------------------------------------------


def flat_divergences(plan, **options):
    """Every weight matters as much as every other."""
    return {
        name: {kind.name: plan.layout.shapes[name][0] * 4.0**-kind.bits_per_weight for kind in kinds}
        for name, kinds in candidates(plan, **options).items()
    }


@pytest.mark.parametrize("family", ["llama", "llama, tied, llama3 rope", "mixtral", "gemma3", "phi3"])
def test_a_dynamic_recipe_keeps_the_size_of_its_base(tokenizer_dir, family):
    config = models.tiny_model(family).config.to_dict()
    plan = export_plan(config, tokenizer_dir, "q4_k_m")
    recipe = dynamic_recipe(plan, flat_divergences(plan))
    dynamic = export_plan(config, tokenizer_dir, recipe)
    assert recipe.name == "dynamic_q4_k_m"
    assert 0.93 * plan.num_bytes <= dynamic.num_bytes <= plan.num_bytes
    types = {info.name: info.type.name for info in dynamic.tensors}
    for name, kind in types.items():
        if ".ffn_gate." in name or ".ffn_gate_exps." in name:
            assert types[name.replace("ffn_gate", "ffn_up")] == kind
    output = "output.weight" if "output.weight" in types else "token_embd.weight"
    assert tensor_type(types[output]).bits_per_weight >= 5


def test_other_sizes(tokenizer_dir):
    config = models.tiny_model("llama").config.to_dict()
    plan = export_plan(config, tokenizer_dir, "q4_k_m")
    divergences = flat_divergences(plan, allow_iq=True)
    by_bits = export_plan(config, tokenizer_dir, dynamic_recipe(plan, divergences, bits_per_weight=5.6))
    assert 5.2 < by_bits.bits_per_weight <= 5.6
    by_size = export_plan(config, tokenizer_dir, dynamic_recipe(plan, divergences, max_size="1.5MB"))
    assert 1_400_000 < by_size.num_bytes <= 1_500_000
    with pytest.raises(GGUFError, match="smallest types"):
        dynamic_recipe(plan, divergences, max_size="0.3 MiB")
    with pytest.raises(ArgumentError):
        dynamic_recipe(plan, divergences, max_size="5GB", bits_per_weight=4)
    with pytest.raises(UnsupportedError, match="not a size"):
        dynamic_recipe(plan, divergences, max_size="five")


@pytest.mark.parametrize("base", ["q3_k_m", "q5_k_m", "q8_0"])
def test_an_embedding_never_gets_less_than_in_the_static_mix(tokenizer_dir, base):
    plan = export_plan(models.tiny_model("llama").config.to_dict(), tokenizer_dir, base)
    static = {info.name: info.type.bits_per_weight for info in plan.tensors}
    choice = candidates(plan)
    assert min(kind.bits_per_weight for kind in choice["token_embd.weight"]) == static["token_embd.weight"]
    assert min(kind.bits_per_weight for kind in choice["blk.0.attn_q.weight"]) < static["blk.0.attn_q.weight"]


def test_names_of_dynamic_methods():
    assert dynamic_base("dynamic_q4_k_m") == "q4_k_m"
    assert dynamic_base("Dynamic-Q3_K_M") == "q3_k_m"
    assert dynamic_base("q4_k_m") is None
    with pytest.raises(UnsupportedError, match="q4_k_m"):
        dynamic_base("dynamic_q4_k_x")


# --- the whole -------------------------------------------------------------------------------------------------------


def python_text_ids(tokenizer_dir, num_tokens: int) -> torch.Tensor:
    """Token ids of the standard library's sources."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"))
        if len(ids) >= num_tokens:
            return torch.tensor(ids[:num_tokens])
    raise AssertionError("not enough text")


def train(model, ids: torch.Tensor, steps: int, batch: int = 8, length: int = 64) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length, (batch,))
        rows = torch.stack([ids[start : start + length] for start in starts])
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def calibrate(model, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """E[x^2] and E[g^2] of each linear layer, by checkpoint name; labels are drawn from the model."""
    inputs, gradients, hooks = SecondMoments(), SecondMoments(), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def see(module, args, output, name=f"{name}.weight"):
                inputs.add(name, args[0])
                output.register_hook(lambda gradient: gradients.add(name, gradient))

            hooks.append(module.register_forward_hook(see))
    for batch in rows.split(8):
        logits = model(batch).logits
        labels = torch.distributions.Categorical(logits=logits).sample()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
        model.zero_grad()
    for hook in hooks:
        hook.remove()
    return inputs.means(), gradients.means()


@torch.no_grad()
def divergence_of(model, plan, importance, rows: torch.Tensor) -> torch.Tensor:
    """KL(model || the model with its weights as in the file of `plan`), per token."""
    types, names = {info.name: info.type for info in plan.tensors}, gguf_names(model.config.to_dict())
    expected = torch.cat([model(batch).logits.log_softmax(-1) for batch in rows.split(8)])
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            quantizer = quantizer_of(types[names[name][0]])
            parameter.copy_(quantizer.decode(quantizer.encode(parameter, importance.get(name))))
    got = torch.cat([model(batch).logits.log_softmax(-1) for batch in rows.split(8)])
    for name, parameter in model.named_parameters():
        parameter.copy_(kept[name])
    return (expected.exp() * (expected - got)).sum(-1).flatten()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dynamic_recipe_beats_the_static_mix_of_its_size(tokenizer_dir):
    """On held-out text, with the same importance: mean and 99 % divergence at most 0.85 of the static mix's."""
    torch.manual_seed(0)
    ids = python_text_ids(tokenizer_dir, 700_000)
    model = models.tiny_model("llama", num_hidden_layers=6, max_position_embeddings=128)
    train(model, ids[:600_000], steps=400)
    importance, output_importance = calibrate(model, ids[600_000:632_768].view(-1, 128))
    held_out = ids[650_000:670_480].view(-1, 128)
    config, names = model.config.to_dict(), gguf_names(model.config.to_dict())
    weights = dict(model.named_parameters())
    for base in ("q3_k_m", "q4_k_m", "q5_k_m"):
        static = export_plan(config, tokenizer_dir, base, has_importance=True)
        types = candidates(static)
        divergences = {
            names[source][0]: expected_divergences(
                weights[source], types[names[source][0]], importance=importance[source],
                output_importance=output_importance[source],
            )
            for source in importance
        }  # fmt: skip
        dynamic = export_plan(config, tokenizer_dir, dynamic_recipe(static, divergences))
        assert dynamic.num_bytes <= static.num_bytes
        before, after = (divergence_of(model, plan, importance, held_out) for plan in (static, dynamic))
        mean, tail = float(after.mean() / before.mean()), float(after.quantile(0.99) / before.quantile(0.99))
        print(f"{base}: mean divergence {float(before.mean()):.2e}, dynamic {mean:.2f} of it, 99 % {tail:.2f}")
        assert mean <= 0.85
        assert tail <= 0.85
