"""Mixtures of experts: checkpoints hold each expert's matrices on their own, transformers stacks them on loading."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from .checkpoints import EXPERTS, adapted, assert_rounded_once, divergence, merged_by_peft, plain, tensors_of


@pytest.fixture(params=EXPERTS)
def base(request, base_of):
    return base_of(request.param)


def saved_as_experts(state: dict[str, torch.Tensor], like, scratch) -> dict[str, torch.Tensor]:
    """A live model's state as transformers writes it to a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float64)
    model.load_state_dict(state)
    model.save_pretrained(scratch)
    return tensors_of(scratch)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ],
    ids=["attention", "experts"],
)
def test_experts_are_merged_one_by_one(base, tmp_path, options):
    model, tokenizer = adapted(base, **options)
    folder = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    before, saved = tensors_of(base), tensors_of(folder)
    truth = saved_as_experts(merged_by_peft(model, base, tmp_path / "adapter"), base, tmp_path / "truth")
    assert saved.keys() == before.keys() == truth.keys()
    changed = [name for name in saved if not torch.equal(saved[name], before[name])]
    for name in changed:
        assert_rounded_once(saved[name], truth[name])
    experts = [name for name in changed if ".experts." in name]
    assert len(experts) == (2 * 4 * 3 if "target_parameters" in options else 0)
    assert divergence(model, plain(folder)[0]) < 5e-3
