"""Several documents in one row train as if each had a row of its own: through raw tensors, collators and TRL."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import DataCollatorWithFlattening, masking_utils
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig, SFTTrainer

from fastllm import FastLanguageModel
from fastllm._errors import DataError
from fastllm.kernels.documents import Documents
from fastllm.models import blocks

from .families import FAMILIES, batch, build, fast_copy, step, with_lora
from .test_parity import check_same_step
from .test_trainers import CONFIG, losses

LENGTHS = [11, 1, 18, 9]
# Of each layer, where a family has them.
WINDOWS = {"mistral": [16] * 4, "gemma2": [16, 0] * 2, "gemma3_text": [16, 0] * 2}


def documents_of(config, lengths=LENGTHS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, config.vocab_size, (length,), generator=generator) for length in lengths]


def in_one_row(documents, device):
    """A packed row; no document's first token is a target, as nothing precedes it."""
    labels = [torch.cat([torch.tensor([-100]), ids[1:]]) for ids in documents]
    row = {
        "input_ids": torch.cat(documents),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents]),
    }
    return {name: tensor[None].to(device) for name, tensor in row.items()}


def padded(documents, device):
    """A row for each document."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(documents, batch_first=True).to(device),
        "labels": pad(documents, batch_first=True, padding_value=-100).to(device),
        "attention_mask": pad([torch.ones_like(ids) for ids in documents], batch_first=True).to(device),
    }


def assert_same_step(got, expected):
    distance = got.distance(expected)
    for name, most in {"loss": 1e-6, "whole": 6e-6, "worst": 2e-5}.items():
        assert distance[name] <= most, (name, distance)


@pytest.fixture
def cases(monkeypatch):
    """The attention cases of every layer that ran."""
    seen = []
    original = blocks.attention_case

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(blocks, "attention_case", recording)
    return seen


@pytest.mark.parametrize("setting", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_trains_as_padded_rows_do(family, setting, device, cases):
    config = FAMILIES[family]
    model = with_lora(fast_copy(build(config, device=device), setting=setting))
    documents = documents_of(config)
    expected = step(model, padded(documents, device))
    cases.clear()
    assert_same_step(step(model, in_one_row(documents, device)), expected)
    assert len(cases) == config.num_hidden_layers
    assert all(case.mask is None and case.documents is cases[0].documents for case in cases)
    assert cases[0].documents.cu_seqlens.tolist() == [0, 11, 12, 30, 39] and cases[0].documents.max_seqlen == 18
    assert [case.sliding_window for case in cases] == WINDOWS.get(family, [0] * 4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {}], ids=["in_parts", "fused"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_the_device_is_not_asked_whether_plain_rows_are_packed(family, options, device, cases, monkeypatch):
    """transformers would, and wait for the answer, in each step."""
    config = FAMILIES[family]
    fast, plain = (
        with_lora(fast_copy(build(config, device=device)), **options),
        with_lora(build(config, device=device), **options),
    )
    inputs = {name: tensor for name, tensor in batch(config, device=device).items() if name != "attention_mask"}
    expected = step(plain, inputs)
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda *_: pytest.fail("the positions were read")
    )
    assert step(fast, inputs).distance(expected)["whole"] < 1e-5
    assert all(case.documents is None and case.mask is None for case in cases)


@pytest.mark.parametrize("options", [{"use_dora": True}, {}], ids=["dora", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_layers_that_run_in_parts(family, options, device):
    """Where a layer is not one node, its attention still keeps documents apart; without gradients too."""
    config = FAMILIES[family]
    plain = build(config, device=device)
    fast, plain = with_lora(fast_copy(plain), **options), with_lora(plain, **options)
    inputs = in_one_row(documents_of(config), device)
    check_same_step(fast, plain, {**inputs, "use_cache": False})
    for implementation in ("eager",) if family == "gemma2" else ("sdpa", "eager"):
        fast.get_base_model().set_attn_implementation(implementation)
        with torch.no_grad():
            ours, theirs = (model.eval()(**inputs, use_cache=False).loss for model in (fast, plain))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_evaluation_keeps_documents_apart(device):
    """Also where nobody says use_cache=False."""
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config, device=device))).eval()
    documents = documents_of(config)
    with torch.no_grad():
        packed, alone = (model(**inputs).loss for inputs in (in_one_row(documents, device), padded(documents, device)))
    assert float(packed) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_documents_stay_apart_under_full_logits(device, training):
    """Where the loss can't be fused, transformers' own forward serves."""
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config, device=device)))
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **kwargs: ForCausalLMLoss(
        logits, labels, vocab_size
    )
    documents = documents_of(config)
    model.train(training)
    with torch.set_grad_enabled(training):
        losses = [model(**inputs).loss for inputs in (in_one_row(documents, device), padded(documents, device))]
    packed, alone = (loss.detach() for loss in losses)
    assert float(packed) == pytest.approx(float(alone), rel=1e-6)


def test_a_document_does_not_see_the_one_before(device):
    """Other tokens in the first document: not a bit of the second one's hidden states changes."""
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config, device=device))).get_base_model().train()
    first, second = documents_of(config, [13, 20])
    found = []
    for tokens in (first, first.flip(0)):
        out = model(**in_one_row([tokens, second], device), output_hidden_states=True)
        found.append(out.hidden_states[-1])
    assert found[0][:, 13:].equal(found[1][:, 13:])
    assert not found[0][:, :13].equal(found[1][:, :13])


def test_several_packed_rows_and_left_padding(device):
    """Rows are packed each in its own way; a mask, where there is one, rules."""
    config = FAMILIES["qwen3"]
    model = with_lora(fast_copy(build(config, device=device)))
    documents = documents_of(config, [6, 14, 15, 5])
    rows = [in_one_row(documents[:2], device), in_one_row(documents[2:], device)]
    both = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    assert_same_step(step(model, both), step(model, padded(documents, device)))
    left = padded(documents[:2], device)
    left = {name: tensor.flip(1) for name, tensor in left.items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plain = with_lora(build(config, device=device))
    check_same_step(model, plain, left)


def test_boundaries_that_a_collator_gives(device, cases):
    """Taken as they are, without a look at the positions, which would make the host wait for the GPU."""
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config, device=device)))
    documents = documents_of(config)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    given = collator([{"input_ids": ids.tolist()} for ids in documents])
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    expected = step(model, padded(documents, device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "from_position_ids", lambda *args: pytest.fail("the positions were read"))
        cases.clear()
        assert_same_step(step(model, given), expected)
    assert all(case.documents.cu_seqlens.tolist() == [0, 11, 12, 30, 39] for case in cases)


@pytest.mark.parametrize("setting", [False, True], ids=["keep", "recompute"])
def test_other_attention_implementations_are_told_the_positions(setting, monkeypatch):
    """flash-attn keeps documents apart by them where nobody gives the boundaries."""
    seen = []

    def recording(module, q, k, v, mask, **passed):
        seen.append(passed["position_ids"])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recording", recording)
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config), setting=setting))
    model.get_base_model().set_attn_implementation("recording")
    inputs = in_one_row(documents_of(config), "cpu")
    step(model, inputs)
    assert len(seen) >= config.num_hidden_layers
    assert all(torch.equal(positions, inputs["position_ids"]) for positions in seen)


def test_boundaries_that_do_not_fit_are_refused():
    config = FAMILIES["llama"]
    model = with_lora(fast_copy(build(config)))
    inputs = in_one_row(documents_of(config), "cpu")
    inputs["cu_seq_lens_q"] = torch.tensor([0, 11, 30], dtype=torch.int32)
    with pytest.raises(DataError, match=r"cu_seq_lens_q.*39 tokens"):
        model(**inputs)


WORDS = ["the fox", "jumps over the lazy dog and asks why the quick brown fox", "asks", "the dog asks and jumps why"]


def sft(checkpoint, folder, *, documents=WORDS, **changes):
    """Losses of three steps and the adapter after them."""
    torch.manual_seed(0)
    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=64, load_in_4bit=False, dtype=torch.float32
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    rows = Dataset.from_list([{"text": text} for text in documents])
    settings = {**CONFIG, "bf16": False, "per_device_train_batch_size": 4, "shuffle_dataset": False, **changes}
    trainer = SFTTrainer(model, SFTConfig(output_dir=str(folder), **settings), None, rows, rows, tokenizer)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses(trainer), trainer.evaluate()["eval_loss"], weights


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "per_device_train_batch_size": 1, "eval_packing": True},
    ],
    ids=["padding_free", "packing"],
)
def test_trl_trains_the_same_packed_as_padded(checkpoint, tmp_path, changes, cases):
    expected, expected_eval, expected_weights = sft(checkpoint, tmp_path / "padded")
    assert all(case.documents is None for case in cases)
    cases.clear()
    got, got_eval, weights = sft(checkpoint, tmp_path / "packed", **changes)
    assert all(case.documents.cu_seqlens.numel() == 5 and case.mask is None for case in cases)
    assert got == pytest.approx(expected, rel=1e-5) and got_eval == pytest.approx(expected_eval, rel=1e-5)
    # Adam's steps, of 1e-2 here, are as long where a gradient is of rounding's size; on a GPU the kernels differ too.
    atol = 1e-4 if torch.cuda.is_available() else 1e-5
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=atol)
