"""Dynamic quantization of mixtures of experts: each expert is measured by the tokens that it met."""

import json
from pathlib import Path

import pytest
import torch

from fastllm.gguf.architectures import architecture_of
from fastllm.gguf.quantizers import quantizer_of
from fastllm.gguf.sensitivity import expected_divergences
from fastllm.gguf.tensor_types import Q2_K, Q3_K
from fastllm.models.calibration import CalibrationData, calibrate, expert_layers, run_experts, token_chunks

from ..gguf.models import VOCAB_SIZE
from .checkpoints import EXPERTS, adapted, load, log_probs
from .test_dynamic import CHATS, types_of

DATA = CalibrationData(CHATS, max_length=64)
LAYER = "model.layers.1.mlp.experts"
WITH_EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(params=EXPERTS)
def base(request, base_of):
    return base_of(request.param)


@pytest.mark.parametrize("options", [{}, WITH_EXPERTS], ids=["base", "adapted experts"])
def test_watched_experts_give_what_transformers_gives(base, options):
    model, _ = adapted(base, dtype=torch.float32, **options) if options else load(base, dtype=torch.float32)
    experts = dict(expert_layers(model))
    assert list(experts) == [f"{'base_model.model.' if options else ''}model.layers.{i}.mlp.experts" for i in (0, 1)]
    hidden = torch.randn(30, 256, generator=torch.Generator().manual_seed(0)).to(model.device)
    routes = torch.rand(30, 4, generator=torch.Generator().manual_seed(1)).to(model.device).topk(2)
    module, seen = list(experts.values())[1], []
    result = run_experts(module, lambda *what: seen.append(what), hidden, routes.indices, routes.values)
    torch.testing.assert_close(result, module(hidden, routes.indices, routes.values), rtol=1e-5, atol=1e-6)
    assert sum(len(rows) for stack, rows, _, _ in seen if stack == "down_proj") == 60
    assert {(stack, expert) for stack, _, _, expert in seen} == {
        (stack, expert) for stack in ("gate_up_proj", "down_proj") for expert in range(4)
    }


def test_inputs_of_an_expert_are_those_of_the_tokens_that_it_met(base):
    model, tokenizer = adapted(base, **WITH_EXPERTS)
    model = model.get_base_model()
    moments = calibrate(model, tokenizer, DATA, gradients=True)
    module, seen = dict(expert_layers(model))[LAYER], []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(args[:2]))
    for chunk in token_chunks(tokenizer, DATA, 64):
        log_probs(model, chunk)
    hook.remove()
    rows, routes = (torch.cat(parts) for parts in zip(*seen, strict=True))
    for expert in range(4):
        met = rows[(routes == expert).any(-1)]
        assert len(met) >= 32
        expected = met.double().square().mean(0).float().cpu()
        torch.testing.assert_close(
            moments.inputs[f"{LAYER}.gate_up_proj"][expert].cpu(), expected, rtol=2e-2, atol=1e-6
        )
    inner = module.down_proj.shape[-1]
    assert moments.inputs[f"{LAYER}.down_proj"].shape == (4, inner)
    assert moments.gradients[f"{LAYER}.gate_up_proj"].shape == (4, 2 * inner)
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
def test_the_cost_of_experts_is_what_their_rounding_costs(base, stack):
    """The expected divergence of each type against the one that the model shows, all else exact."""
    model, tokenizer = load(base, dtype=torch.float32)
    moments = calibrate(model, tokenizer, DATA, gradients=True)
    weight = getattr(dict(expert_layers(model))[LAYER], stack)
    before, chunks = weight.detach().clone(), token_chunks(tokenizer, DATA, 64)
    expected = expected_divergences(
        before, [Q2_K, Q3_K], importance=moments.inputs[f"{LAYER}.{stack}"],
        output_importance=moments.gradients[f"{LAYER}.{stack}"], sampled_rows=10**6,
    )  # fmt: skip
    exact = [log_probs(model, chunk) for chunk in chunks]
    for kind in (Q2_K, Q3_K):
        quantizer = quantizer_of(kind)
        with torch.no_grad():
            for matrix, columns in zip(weight, moments.inputs[f"{LAYER}.{stack}"], strict=True):
                matrix.copy_(quantizer.decode(quantizer.encode(matrix.float(), columns.to(matrix.device))))
        found = [(p.exp() * (p - log_probs(model, chunk))).sum(-1) for p, chunk in zip(exact, chunks, strict=True)]
        with torch.no_grad():
            weight.copy_(before)
        assert expected[kind.name] == pytest.approx(float(torch.cat(found).mean()), rel=0.4)


def test_experts_get_types_of_their_own(judge, base, tmp_path):
    model, tokenizer = adapted(base, **WITH_EXPERTS)
    written = model.save_pretrained_gguf(
        tmp_path / "out", tokenizer, quantization_method=["q4_k_m", "dynamic_q4_k_m"], calibration_dataset=CHATS
    )
    static, dynamic = map(Path, written["gguf_files"])
    assert dynamic.stat().st_size <= static.stat().st_size
    recipe = json.loads(next(dynamic.parent.glob("*.recipe.json")).read_text())
    architecture, config = architecture_of(model.config.to_dict())
    experts = {name for name in architecture.layout(config).shapes if "_exps" in name}
    assert len(experts) == 6
    assert experts <= recipe["types"].keys()
    types = types_of(dynamic)
    assert all(types[f"blk.{i}.ffn_gate_exps.weight"] == types[f"blk.{i}.ffn_up_exps.weight"] for i in (0, 1))
    with judge.loaded(dynamic, VOCAB_SIZE) as loaded:
        assert len(loaded.greedy([5, 6, 7], 3)) == 3
