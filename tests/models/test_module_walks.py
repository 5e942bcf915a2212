"""What trainers ask of a model in every step gives what torch's and transformers' own methods give."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fastllm import FastLanguageModel
from fastllm.models.module_walks import modules_of, set_training


@pytest.fixture(params=[False, True], ids=["16-bit", "4-bit"])
def model(request, checkpoint):
    model, _ = FastLanguageModel.from_pretrained(checkpoint, max_seq_length=64, load_in_4bit=request.param)
    return FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "down_proj"])


class Frozen(nn.Module):
    """Stays in evaluation mode, as some norms do."""

    asked = 0

    def train(self, mode=True):
        self.asked += 1
        return super().train(False)


def modes(model):
    return [module.training for module in model.modules()]


def test_parameters_and_modules_come_in_torch_s_order(model):
    assert isinstance(model, PeftModel) and type(model).__name__ == "PeftModelForCausalLM"
    assert modules_of(model) == list(model.modules())
    assert list(map(id, model.parameters())) == [id(p) for _, p in model.named_parameters()]
    assert list(model.parameters(recurse=False)) == []


def test_modules_that_are_shared_come_once():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(shared, None), shared, nn.Sequential())
    assert modules_of(model) == list(model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_torch_s(model, mode):
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.get_base_model().model.layers[1].eval()
        each.get_base_model().model.norm.train()
        each.get_base_model().model.layers[0].add_module("frozen", Frozen())
    assert model.train(mode) is model
    nn.Module.train(plain, mode)
    assert modes(model) == modes(plain)
    assert model.get_base_model().model.layers[0].frozen.asked == 1
    base = model.get_base_model()
    assert base.train(not mode) is base and base.model.layers[1].training is not mode


def test_a_mode_is_a_bool(model):
    for each in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="boolean"):
            each.train("yes")


def test_the_root_s_own_method_may_call_it():
    class Counted(nn.Sequential):
        def train(self, mode=True):
            set_training(self, mode)
            return self

    assert modes(Counted(nn.Linear(1, 1)).train(False)) == [False, False]


@pytest.mark.parametrize("only_trainable", [False, True])
@pytest.mark.parametrize("exclude_embeddings", [False, True])
def test_numbers_of_parameters_are_transformers(model, only_trainable, exclude_embeddings):
    options = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
    base = model.get_base_model()
    base.lm_head.weight = base.model.embed_tokens.weight  # tied: the head's is the embedding's
    assert model.num_parameters(**options) == PreTrainedModel.num_parameters(base, **options) > 0


def test_gradients_are_dropped(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    model.zero_grad()
    assert all(p.grad is None for _, p in model.named_parameters())
