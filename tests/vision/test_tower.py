"""The vision tower's blocks: what they share, what they keep, and when they are left to transformers."""

import copy

import pytest
import torch

from fastllm import FastVisionModel
from fastllm.kernels import documents
from fastllm.models import memory, vision_tower
from fastllm.models.patch import restore, unwrapped
from fastllm.models.vision_tower import TOWER
from tests.kernels.parity import OverLimit, check_no_farther
from tests.models.families import step
from tests.planting import Bug, plant

from .test_parity import batch_of

PATCHES = {"grid": torch.tensor([[1, 8, 6], [1, 4, 4], [2, 4, 12]]), "channels": 3 * 2 * 4 * 4}


def load(checkpoint, *, checkpointing=False, dropout=0.0, dtype=torch.float32):
    """A model with adapters on its tower and its decoder, away from zero."""
    model, processor = FastVisionModel.from_pretrained(checkpoint, load_in_4bit=False, dtype=dtype)
    model = FastVisionModel.get_peft_model(model, r=4, lora_dropout=dropout, use_gradient_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model, processor


def tower_of(model):
    return unwrapped(model).model.visual


def pictures(tower, dtype=torch.float32):
    """Patches of images and a clip of different sizes, and those sizes, where the tower is."""
    count = int(PATCHES["grid"].prod(1).sum())
    patches = torch.randn(count, PATCHES["channels"], generator=torch.Generator().manual_seed(4))
    return {"hidden_states": patches.to(tower.device, dtype), "grid_thw": PATCHES["grid"].to(tower.device)}


def tower_step(model, dtype=torch.float32):
    """Outputs of the tower, and the gradients of its adapters."""
    tower = tower_of(model)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(6)
    out = tower(**pictures(tower, dtype)).pooler_output
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    (out * weights).sum().backward()
    return out.detach(), {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}


def check_tower(checkpoint):
    """Features and gradients are those of transformers, up to the order of sums."""
    model, _ = load(checkpoint)
    model.train()
    ours, our_grads = tower_step(model)
    restore(unwrapped(model))
    theirs, their_grads = tower_step(model)
    exact, exact_grads = tower_step(copy.deepcopy(model).double(), torch.float64)
    assert our_grads.keys() == their_grads.keys() and len(our_grads) >= 16
    check_no_farther(
        {"features": ours, **our_grads}, {"features": theirs, **their_grads}, {"features": exact, **exact_grads}
    )


def test_features_and_gradients_are_those_of_transformers(checkpoint):
    check_tower(checkpoint)


BUGS = {
    "images_see_each_other": Bug("Documents.from_cu_seqlens(cu_seqlens).on(device)", "None", "qwen2_vl"),
    "windows_taken_for_images": Bug("if known.cu_seqlens is cu_seqlens and", "if", "qwen2_5_vl"),
    "norms_exchanged": Bug("norm1, norm2 = norms", "norm2, norm1 = norms", "qwen2_vl"),
    "gate_and_up_exchanged": Bug("for part in parts]", "for part in parts[::-1]]", "qwen2_5_vl"),
    "causal": Bug("documents=documents, causal=False", "documents=documents", "qwen2_vl"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [pytest.param(bug, id=name) for name, bug in BUGS.items()])
def test_planted_bug_is_noticed(bug, checkpoints, monkeypatch, tmp_path):
    plant("fastllm.models.vision_tower", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        check_tower(checkpoints[bug.check])


def test_the_device_is_waited_for_once_a_kind_of_segment(checkpoint, family, monkeypatch):
    """Blocks share the segments: one look at the offsets for images, one for windows, whatever the depth."""
    model, _ = load(checkpoint)
    made = []
    make = documents.Documents.from_cu_seqlens
    monkeypatch.setattr(documents.Documents, "from_cu_seqlens", lambda offsets: made.append(offsets) or make(offsets))
    tower_step(model)
    assert len(made) == {"qwen2_vl": 1, "qwen2_5_vl": 2}[family]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_bits(checkpoint, dropout):
    model, _ = load(checkpoint, dropout=dropout)
    model.train()
    kept, kept_grads = tower_step(model)
    FastVisionModel.for_training(model, use_gradient_checkpointing=True)
    recomputed, grads = tower_step(model)
    assert kept.equal(recomputed) and all(grad.equal(kept_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize(
    ("setting", "free", "recomputes"),
    [
        (False, 2**40, False), (True, 2**40, True), ("offload", 2**40, True), ("unsloth", 2**40, False),
        ("unsloth", 2**20, True),
    ],
)  # fmt: skip
def test_blocks_follow_the_setting_of_the_model(checkpoint, monkeypatch, messages, setting, free, recomputes):
    """`"unsloth"` keeps activations where they take a small part of the free memory, and recomputes them elsewhere."""
    model, processor = load(checkpoint, checkpointing=setting)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    calls = []
    run = vision_tower.vision_block
    monkeypatch.setattr(
        vision_tower, "vision_block", lambda x, b, call: calls.append(call.recompute) or run(x, b, call)
    )
    step(model, batch_of(model, processor))
    assert calls == [recomputes] * 2
    assert ("vision tower recomputes" in messages()) == (free == 2**20)
    calls.clear()
    with torch.no_grad():
        model(**batch_of(model, processor))
    assert calls == [False] * 2


def test_the_plan_of_the_decoder_knows_what_the_tower_holds(checkpoint):
    model, processor = load(checkpoint, checkpointing="unsloth")
    planner = getattr(tower_of(model).blocks[0], TOWER).planner
    step(model, batch_of(model, processor))
    assert planner.tower_bytes == 0 and len(planner._plans) == 1
    planner.tower_bytes = 2**30  # a batch of more images, of as many tokens
    embedded = torch.randn(1, 8, 64, device=model.device, requires_grad=True)
    unwrapped(model).model.language_model(inputs_embeds=embedded, use_cache=False)
    assert len(planner._plans) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cause", ["hook on a norm", "hook on a projection", "DoRA", "attention implementation"])
def test_what_can_not_be_fused_is_left_to_transformers(checkpoint, cause, checkpointing):
    """With the reason in the report, the result of transformers, and recomputation as asked."""
    model, processor = load(checkpoint, checkpointing=checkpointing)
    tower, calls = tower_of(model), []
    if cause == "hook on a norm":
        tower.blocks[1].norm1.register_forward_hook(lambda *args: calls.append(1))
    elif cause == "hook on a projection":
        tower.blocks[1].attn.proj.register_forward_hook(lambda *args: calls.append(1))
    elif cause == "DoRA":
        tower.blocks[1].attn.proj.lora_variant["default"] = object()
    else:
        tower.config._attn_implementation = "flash_attention_2"
    told = str(model.fast_report())
    reason = {"DoRA": "LoRA variant", "attention implementation": "flash_attention_2"}.get(cause, "forward hook")
    fused = 0 if cause == "attention implementation" else 1
    assert f"{fused} of 2 vision blocks fused" in told and reason in told
    if "hook" in cause:
        step(model, batch_of(model, processor))
        assert len(calls) == (2 if checkpointing else 1)


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_outputs_on_request(checkpoint, wanted):
    """As transformers records them; for attentions the blocks call transformers' own modules."""
    model, _ = load(checkpoint)
    tower = tower_of(model)
    with torch.no_grad():
        ours = tower(**pictures(tower), **{wanted: True})[wanted.removeprefix("output_")]
        restore(unwrapped(model))
        theirs = tower(**pictures(tower), **{wanted: True})[wanted.removeprefix("output_")]
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_copies_and_restored_models_stand_alone(checkpoint):
    model, _ = load(checkpoint)
    clone = copy.deepcopy(model)
    towers = [getattr(tower_of(m).blocks[0], TOWER) for m in (model, clone)]
    assert towers[0] is not towers[1] and towers[1] is getattr(tower_of(clone).blocks[1], TOWER)
    restore(unwrapped(clone))
    assert not any(hasattr(block, TOWER) for block in tower_of(clone).blocks)
    assert torch.allclose(tower_step(model)[0], tower_step(clone)[0], rtol=1e-4, atol=1e-5)
