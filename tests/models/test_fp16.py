"""Gemma 3 in fp16, whose residual stream passes the range of fp16: it is held in fp32 around fp16 products."""

import copy

import pytest
import torch

from .families import FAMILIES, batch, build, fast_copy, step, with_lora

FAMILY = "gemma3_text"


@pytest.fixture(scope="module")
def wide_model():
    """fp32 weights that fp16 holds, and activations that it does not."""
    model = build(FAMILIES[FAMILY])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name and "layernorm" in name:
                parameter.mul_(3e4).add_(1e4)
    return model.half().float()


@pytest.mark.parametrize("setting", [False, True], ids=["keep", "recompute"])
def test_a_step_that_overflows_in_transformers(wide_model, setting):
    inputs = batch(FAMILIES[FAMILY])
    exact = step(with_lora(copy.deepcopy(wide_model)), inputs)
    plain = copy.deepcopy(wide_model).half()
    with torch.no_grad():
        assert not plain(**inputs, output_hidden_states=True).hidden_states[-2].isfinite().all()
    found = step(with_lora(fast_copy(plain, setting=setting)), inputs, loss_scale=1024.0)
    assert found.loss == pytest.approx(exact.loss, rel=2e-3)
    assert found.distance(exact)["whole"] < 2e-2


def test_logits_answers_and_evaluation(wide_model):
    fast = with_lora(fast_copy(copy.deepcopy(wide_model).half())).eval()
    exact = with_lora(copy.deepcopy(wide_model)).eval()
    inputs = batch(FAMILIES[FAMILY])
    with torch.no_grad():
        ours, theirs = fast(**inputs), exact(**inputs)
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=2e-3)
        shown = inputs["attention_mask"].bool()
        assert (ours.logits[shown] - theirs.logits[shown]).norm() < 1e-2 * theirs.logits[shown].norm()
    prompt = inputs["input_ids"][:1]
    scores = [
        model.generate(prompt, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
        for model in (fast, exact)
    ]
    ours, theirs = (found.logits[0].float() for found in scores)
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()
