"""Retyping changes one model and nothing else, can be undone, and says what runs fused."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from fastllm._errors import ModelError
from fastllm.models.arch import Arch, get_arch, supported_model_types
from fastllm.models.patch import adapt, report, restore

from .families import FAMILIES, batch, build, fast_copy, step, with_lora


@pytest.mark.parametrize("family", FAMILIES)
def test_types_names_and_state_dict_stay(family):
    plain = build(FAMILIES[family])
    fast = fast_copy(plain)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(fast.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(fast.modules(), plain.modules(), strict=True):
        assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    classes = get_arch(fast.config.model_type).classes
    assert {type(module) for module in fast.modules()} >= set(classes.values())


def test_a_second_model_and_the_classes_are_untouched():
    before = {name: dict(vars(cls)) for name, cls in vars(modeling_llama).items() if isinstance(cls, type)}
    plain = build(FAMILIES["llama"])
    fast_copy(plain)
    assert all(type(module).__module__ != "fastllm.models.blocks" for module in plain.modules())
    after = {name: dict(vars(cls)) for name, cls in vars(modeling_llama).items() if isinstance(cls, type)}
    assert before == after


def test_restore_gives_every_class_back():
    plain = build(FAMILIES["qwen3"])
    fast = restore(fast_copy(plain))
    assert [type(module) for module in fast.modules()] == [type(module) for module in plain.modules()]
    inputs = batch(FAMILIES["qwen3"])
    assert step(fast, inputs).loss == step(plain, inputs).loss


def test_a_deep_copy_trains_on_its_own():
    fast = with_lora(fast_copy(build(FAMILIES["llama"])))
    inputs = batch(FAMILIES["llama"])
    expected = step(fast, inputs)
    clone = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert step(fast, inputs).loss == expected.loss
    assert step(clone, inputs).loss != expected.loss


def test_save_and_reload_with_plain_transformers(tmp_path):
    plain = build(FAMILIES["llama"])
    fast = fast_copy(plain)
    fast.save_pretrained(tmp_path / "full")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert reloaded.config.architectures == ["LlamaForCausalLM"]
    for (name, a), (_, b) in zip(reloaded.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    adapted = with_lora(fast)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    inputs = batch(FAMILIES["llama"])
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = adapted.eval()(**inputs).logits[shown], loaded.eval()(**inputs).logits[shown]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hidden_states_and_attentions_are_still_recorded():
    plain = build(FAMILIES["llama"])
    fast = fast_copy(plain)
    inputs = batch(FAMILIES["llama"])
    inputs["attention_mask"] = None
    plain.set_attn_implementation("eager")
    fast.set_attn_implementation("eager")
    ours, theirs = (model(**inputs, output_hidden_states=True, output_attentions=True) for model in (fast, plain))
    assert len(ours.attentions) == len(theirs.attentions) == 4
    for a, b in zip((*ours.hidden_states, *ours.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert report(fast).num_fused == 4  # the hooks that transformers leaves behind do not slow later steps
    torch.testing.assert_close(fast(**inputs).loss, plain(**inputs).loss)


def test_a_user_s_hook_is_run_and_reported():
    fast = with_lora(fast_copy(build(FAMILIES["llama"])))
    seen = []
    layers = fast.get_base_model().model.layers
    layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layers[2].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    step(fast, batch(FAMILIES["llama"]))
    assert len(seen) == 2
    text = str(fast.fast_report())
    assert "2 of 4 decoder layers fused" in text and "hook" in text


def loss_of(model, inputs):
    with torch.no_grad():
        return float(model(**inputs).loss)


@pytest.mark.parametrize("change", ["disabled", "merged", "second adapter", "frozen"])
def test_changes_after_the_first_step_are_followed(change):
    """Remembered views of the adapters are dropped as soon as PEFT changes something."""
    plain = build(FAMILIES["llama"])
    fast, plain = with_lora(fast_copy(plain)), with_lora(plain)
    inputs = batch(FAMILIES["llama"])
    step(fast, inputs), step(plain, inputs)
    if change == "disabled":
        with fast.disable_adapter(), plain.disable_adapter():
            assert abs(loss_of(fast, inputs) - loss_of(plain, inputs)) < 1e-5
        return
    for model in (fast, plain):
        if change == "merged":
            model.merge_adapter()
        elif change == "second adapter":
            torch.manual_seed(7)
            config = copy.deepcopy(model.peft_config["default"])
            config.init_lora_weights = False
            model.add_adapter("other", config)
            model.set_adapter("other")
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_B" in name)
    assert abs(loss_of(fast, inputs) - loss_of(plain, inputs)) < 1e-5
    if change != "merged":
        ours, theirs = step(fast, inputs), step(plain, inputs)
        assert set(ours.grads) == set(theirs.grads)
        assert ours.distance(theirs)["whole"] < 1e-5


def test_a_foreign_forward_is_refused():
    plain = build(FAMILIES["llama"])
    plain.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(ModelError, match=r"layers\.0\.mlp"):
        adapt(plain, get_arch("llama"), False)


def test_an_arch_checks_its_own_contract():
    class Wrong(modeling_llama.LlamaMLP):
        pass

    with pytest.raises(TypeError, match="keep its name"):
        Arch("llama", {}, {modeling_llama.LlamaMLP: Wrong})


def test_every_listed_type_has_an_arch():
    for model_type in supported_model_types():
        assert get_arch(model_type).model_type == model_type
    assert get_arch("no-such-model") is None


WORLD = """
import torch, transformers, peft, bitsandbytes
from transformers.models.llama import modeling_llama
import trl.trainer.sft_trainer, trl.trainer.sft_config
def snapshot():
    libraries = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    modules = {n: m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in libraries}
    state = {}
    for name, module in modules.items():
        for key, value in list(vars(module).items()):
            if callable(value):
                state[name, key] = id(value)
                if isinstance(value, type):
                    for k, v in list(vars(value).items()):
                        if callable(v) or isinstance(v, property):
                            state[name, key, k] = id(v)
    return state
"""


def test_the_world_is_unchanged_but_for_the_shim(checkpoint):
    """Importing, loading and training change no function or class of any other library, TRL's constructors excepted."""
    script = f"""
import sys, gc
gc.disable()
{WORLD}
before = snapshot()
import fastllm
from fastllm import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained({checkpoint!r}, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model)
ids = torch.randint(5, 400, (2, 16), device=model.device)
model(input_ids=ids, labels=ids).loss.backward()
after = snapshot()
changed = sorted(".".join(key) for key in before if after.get(key) != before[key])
from fastllm.compat import uninstall_trl_shim
uninstall_trl_shim()
restored = snapshot()
left = sorted(".".join(key) for key in before if restored.get(key) != before[key])
print("CHANGED", changed)
print("LEFT", left)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    changed = next(line for line in result.stdout.splitlines() if line.startswith("CHANGED"))
    names = [name.strip("[]' ") for name in changed.removeprefix("CHANGED").split(",")]
    assert names and all(name.startswith("trl.") and name.endswith(".__init__") for name in names), changed
    assert "LEFT []" in result.stdout
