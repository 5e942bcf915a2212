"""Towers that several families share, and that of Llama 3.2 Vision: their blocks beside transformers' own."""

import copy

import pytest
import torch
from transformers.models.pixtral import modeling_pixtral

from fastllm import FastVisionModel
from fastllm.kernels import documents
from fastllm.models import memory, vision_tower
from fastllm.models.patch import restore, unwrapped
from fastllm.models.vision_tower import TOWER
from tests.kernels.parity import OverLimit, check_no_farther
from tests.models.families import fast_copy, with_lora
from tests.planting import Bug, plant

from .families import FAMILIES, batch
from .test_families import build, in_dtype

# The last blocks of Llama 3.2 Vision's tower have gates, and are left to transformers.
TOWERS = {"siglip": "gemma3", "clip": "llava-llama", "pixtral": "pixtral", "mllama": "mllama"}
FUSED = 2
TARGETS = r".*(vision_tower|vision_model).*layers.*\.((q|k|v|o|out|gate|up|down)_proj|fc[12])"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INPUTS = ("pixel_values", "image_sizes", "aspect_ratio_ids", "aspect_ratio_mask")


@pytest.fixture(params=TOWERS)
def name(request):
    return request.param


def load(name, *, setting=False, targets=TARGETS, **options):
    """A model with adapters on its tower, away from zero."""
    model = fast_copy(build(FAMILIES[TOWERS[name]], DEVICE), setting=setting)
    return with_lora(model, target_modules=targets, **options).train()


def tower_of(model):
    inner = unwrapped(model).model
    return inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model


def blocks_of(model):
    return [module for module in tower_of(model).modules() if hasattr(module, TOWER)]


def attention_of(block):
    return getattr(block, block.block_names.attention)


def pictures(name, dtype=torch.float32):
    """Three images: of different sizes for Pixtral, of one and two tiles for Llama 3.2 Vision."""
    whole = in_dtype(batch(FAMILIES[TOWERS[name]]), dtype)
    return {key: value.to(DEVICE) for key, value in whole.items() if key in INPUTS}


def features(model, name, dtype=torch.float32, **options):
    return tower_of(model)(**pictures(name, dtype), **options).last_hidden_state


def tower_step(model, name, dtype=torch.float32):
    """Features of the tower, and the gradients of its adapters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(6)
    out = features(model, name, dtype)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    (out * weights).sum().backward()
    return out.detach(), {n: p.grad for n, p in tower_of(model).named_parameters() if p.grad is not None}


def check_tower(name, **options):
    """Features and gradients are those of transformers, up to the order of sums."""
    model = load(name, **options)
    ours, our_grads = tower_step(model, name)
    restore(unwrapped(model))
    theirs, their_grads = tower_step(model, name)
    exact, exact_grads = tower_step(copy.deepcopy(model).double(), name, torch.float64)
    assert our_grads.keys() == their_grads.keys() and our_grads
    check_no_farther(
        {"features": ours, **our_grads}, {"features": theirs, **their_grads}, {"features": exact, **exact_grads}
    )


def test_features_and_gradients_are_those_of_transformers(name):
    check_tower(name)


@pytest.mark.parametrize("targets", [r"(q|k|v)_proj", r"(o|out)_proj", r"(fc1|gate_proj|up_proj)", r"(fc2|down_proj)"])
def test_adapters_on_some_projections(name, targets):
    check_tower(name, targets=rf".*(vision_tower|vision_model).*layers.*\.{targets}")


BUGS = {
    "images_see_each_other": Bug("Documents.from_cu_seqlens(cu_seqlens).on(device)", "None", "pixtral"),
    "tiles_that_are_padding_are_seen": Bug('mask = given.get("attention_mask")', "mask = None", "mllama"),
    "causal": Bug("documents=documents, causal=False", "documents=documents", "siglip"),
    "no_angles": Bug('angles = given.get("position_embeddings")', "angles = None", "pixtral"),
    "heads_not_scaled": Bug("return scaling, rate", "return 1.0, rate", "clip"),
    "keys_taken_for_queries": Bug("for part in parts]", "for part in parts[::-1]]", "siglip"),
}  # fmt: skip


@pytest.mark.parametrize("bug", [pytest.param(bug, id=name) for name, bug in BUGS.items()])
def test_planted_bug_is_noticed(bug, monkeypatch, tmp_path):
    plant("fastllm.models.vision_tower", bug, monkeypatch, tmp_path)
    with pytest.raises(OverLimit):
        check_tower(bug.check)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_bits(name, dropout):
    """With dropout in the adapters, and in the attention of those that have it."""
    model = load(name, lora_dropout=dropout)
    for block in blocks_of(model)[:FUSED]:
        attention_of(block).dropout = dropout
    kept, kept_grads = tower_step(model, name)
    getattr(blocks_of(model)[0], TOWER).planner.use(True)
    recomputed, grads = tower_step(model, name)
    assert kept.equal(recomputed) and all(grad.equal(kept_grads[part]) for part, grad in grads.items())


@pytest.mark.parametrize(
    ("setting", "free", "recomputes"),
    [(False, 2**40, False), (True, 2**40, True), ("unsloth", 2**40, False), ("unsloth", 2**10, True)],
)
def test_blocks_follow_the_setting_of_the_model(name, monkeypatch, setting, free, recomputes):
    model = load(name, setting=setting)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    calls = []
    run = vision_tower.vision_block
    monkeypatch.setattr(
        vision_tower, "vision_block", lambda x, b, call: calls.append(call.recompute) or run(x, b, call)
    )
    features(model, name)
    assert calls == [recomputes] * FUSED
    with torch.no_grad():
        features(model, name)
    assert calls == [recomputes] * FUSED + [False] * FUSED


def test_images_end_to_end_need_no_dense_mask(monkeypatch):
    """Pixtral's blocks learn where each image ends from offsets on the host, read once a forward."""
    model, made = load("pixtral"), []
    make = documents.Documents.from_cu_seqlens
    monkeypatch.setattr(documents.Documents, "from_cu_seqlens", lambda offsets: made.append(offsets) or make(offsets))
    monkeypatch.delattr(modeling_pixtral, "generate_block_attention_mask")
    features(model, "pixtral")
    assert [(offsets.device.type, offsets.tolist()) for offsets in made] == [("cpu", [0, 12, 20, 24])]


def test_a_rotated_block_is_not_run_without_angles():
    """transformers' own forward then says what is missing."""
    with pytest.raises(TypeError):
        blocks_of(load("pixtral"))[0](torch.randn(1, 4, 32, device=DEVICE), None)


def test_an_image_does_not_see_another():
    model, given = load("pixtral"), pictures("pixtral")
    with torch.no_grad():
        together = tower_of(model)(**given).last_hidden_state
        one = tower_of(model)(given["pixel_values"][1:2], given["image_sizes"][1:2]).last_hidden_state
        whole = tower_of(model)(given["pixel_values"][:1]).last_hidden_state
    torch.testing.assert_close(together[:, 12:20], one, rtol=1e-5, atol=1e-5)
    assert whole.shape[1] == 24  # without sizes, an image is all that was given of it


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cause", ["hook on a norm", "hook on a projection", "DoRA", "two adapters"])
def test_what_can_not_be_fused_is_left_to_transformers(name, cause, checkpointing):
    """One block of the tower, with the reason in the report, the result of transformers, and recomputation as asked."""
    model, calls = load(name, setting=checkpointing, use_dora=cause == "DoRA"), []
    block = blocks_of(model)[1]
    module = attention_of(block).q_proj if "projection" in cause else getattr(block, block.block_names.norm2)
    if "hook" in cause:
        module.register_forward_hook(lambda *args: calls.append(1))
    elif cause == "two adapters":
        model.add_adapter("second", model.peft_config["default"])
        attention_of(block).q_proj.set_adapter(["default", "second"])
    told = str(model.fast_report())
    reason = {"DoRA": "LoRA variant", "two adapters": "2 adapters are active"}.get(cause, "forward hook")
    fused = 0 if cause == "DoRA" else FUSED - 1
    assert f"{fused} of {len(blocks_of(model))} vision blocks fused" in told and reason in told
    ours, our_grads = tower_step(model, name)
    if "hook" in cause:
        assert len(calls) == (2 if checkpointing else 1)
    restore(unwrapped(model))
    theirs, their_grads = tower_step(model, name)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations(name, implementation):
    """Eager attention has fused blocks, with its own result; others are called as transformers calls them."""
    model = load(name)
    tower_of(model).config._attn_implementation = implementation
    told = str(model.fast_report())
    if implementation == "eager":
        assert f"{FUSED} of {len(blocks_of(model))} vision blocks fused" in told
        ours = features(model, name)
        restore(unwrapped(model))
        torch.testing.assert_close(ours, features(model, name), rtol=1e-4, atol=1e-5)
    else:
        assert "its attention implementation is 'flex_attention'" in told and "0 of" in told


@pytest.mark.parametrize("name", ["siglip", "clip", "pixtral"])
@pytest.mark.parametrize("wanted", ["hidden_states", "attentions"])
def test_outputs_on_request(name, wanted):
    """As transformers records them; for attentions the blocks call transformers' own modules."""
    model = load(name)
    tower = tower_of(model)
    tower.config._attn_implementation = "eager" if wanted == "attentions" else "sdpa"
    with torch.no_grad():
        ours = tower(**pictures(name), **{f"output_{wanted}": True})[wanted]
        restore(unwrapped(model))
        theirs = tower(**pictures(name), **{f"output_{wanted}": True})[wanted]
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_tuple_on_request():
    model = load("pixtral")
    with torch.no_grad():
        assert features(model, "pixtral").equal(tower_of(model)(**pictures("pixtral"), return_dict=False)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_under_autocast(name, dtype):
    """An fp32 tower that computes in 16 bits, masks included."""
    model = load(name)
    with torch.autocast("cpu", dtype):
        ours, our_grads = tower_step(model, name)
    exact, exact_grads = tower_step(model, name)
    torch.testing.assert_close(ours.float(), exact, rtol=0.05, atol=0.05)
    for part, truth in exact_grads.items():
        assert float((our_grads[part] - truth).norm() / truth.norm()) < 0.05, part


@pytest.mark.parametrize(
    ("switches", "kinds"),
    [
        ({}, {"attention", "mlp"}),
        ({"finetune_attention_modules": False}, {"mlp"}),
        ({"finetune_mlp_modules": False}, {"attention"}),
        ({"finetune_vision_layers": False}, set()),
    ],
)  # fmt: skip
def test_every_switch_trains_through_the_fused_blocks(name, switches, kinds):
    plain = fast_copy(build(FAMILIES[TOWERS[name]], DEVICE))
    model = FastVisionModel.get_peft_model(plain, r=2, use_gradient_checkpointing=False, **switches).train()
    assert sum(block.path == "fused" for block in model.fast_report().vision) == FUSED
    found = {n for n, p in tower_of(model).named_parameters() if p.requires_grad}
    assert {"mlp" if ".mlp." in n or ".feed_forward." in n else "attention" for n in found} == kinds
    if found:
        assert tower_step(model, name)[1].keys() == found


def test_copies_and_restored_models_stand_alone(name):
    model = load(name)
    clone = copy.deepcopy(model)
    towers = [getattr(blocks_of(m)[0], TOWER) for m in (model, clone)]
    assert towers[0] is not towers[1] and towers[1] is getattr(blocks_of(clone)[1], TOWER)
    restore(unwrapped(clone))
    assert not blocks_of(clone)
    assert torch.allclose(tower_step(model, name)[0], tower_step(clone, name)[0], rtol=1e-4, atol=1e-5)
