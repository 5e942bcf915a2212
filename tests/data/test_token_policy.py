"""Which tokens open, end and fill rows: checked over real tokenizers."""

from types import SimpleNamespace

import pytest

from fastllm.chat_templates import create_stopping_criteria, get_chat_template, remove_special_tokens
from fastllm.data import RowEncoder, token_policy

from .conftest import REAL, RealTokenizers, talk

# vocabularies that come without a chat template, and one that fits them
FITTING = {
    "llama-bpe": "llama-3.1", "llama-spm": "llama", "deepseek-llm": "vicuna", "starcoder": "chatml",
    "mistral-v1": "mistral", "mistral-v2": "mistral", "mistral-v3": "mistral", "mistral-v7": "mistral",
}  # fmt: skip
WITHOUT_A_SPARE_TOKEN = ("gpt-2", "falcon")


@pytest.fixture
def tokenizer(request, real: RealTokenizers):
    tokenizer = real.fresh(request.param) if request.param in WITHOUT_A_SPARE_TOKEN else real(request.param)
    if not tokenizer.chat_template:
        get_chat_template(tokenizer, FITTING.get(request.param, "alpaca"))
    return tokenizer


@pytest.mark.parametrize("tokenizer", [name for name in REAL if name not in WITHOUT_A_SPARE_TOKEN], indirect=True)
def test_real_tokenizers_begin_once_stop_and_pad_with_something_else(tokenizer):
    policy = token_policy(tokenizer)
    assert not policy.problems
    assert tokenizer.eos_token_id in policy.stop_ids
    assert policy.pad_id == tokenizer.pad_token_id
    assert policy.pad_id is not None and policy.pad_id not in (*policy.stop_ids, policy.bos_id)
    (row,) = RowEncoder(tokenizer).encode([{"messages": talk("Why?", "Because 12.", "And?", "No.")}])
    if policy.bos_id is not None:
        assert row.input_ids[:2].count(policy.bos_id) == (policy.bos_from == "template")
    ends = [row.labels[i] for i in range(len(row.labels) - 1) if row.labels[i] != -100 and row.labels[i + 1] == -100]
    ends += row.labels[-1:] if row.labels[-1] != -100 else []
    assert len(ends) == 2
    assert set(ends) <= set(policy.stop_ids)
    assert policy.pad_id not in [label for label in row.labels if label != -100]


@pytest.mark.parametrize("tokenizer", WITHOUT_A_SPARE_TOKEN, indirect=True)
def test_a_vocabulary_without_a_spare_token_says_what_to_add(tokenizer):
    with pytest.raises(ValueError, match="add_special_tokens"):
        token_policy(tokenizer)
    policy = token_policy(tokenizer, mend=False)
    assert policy.problems == ("there is no PAD token",)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert not token_policy(tokenizer).problems


def test_a_pad_token_that_stops_is_replaced_and_told(toy, caplog):
    get_chat_template(toy, "chatml")
    toy.pad_token = toy.eos_token
    with caplog.at_level("INFO", "fastllm"):
        policy = token_policy(toy)
    assert toy.pad_token == policy.pad_token == "<pad>"
    assert "PAD '<|im_end|>' also stops generation" in caplog.text
    toy.pad_token = toy.eos_token
    assert "also stops generation" in token_policy(toy, mend=False).problems[0]
    assert toy.pad_token == toy.eos_token


def test_stop_tokens_come_from_the_tokenizer_the_config_and_the_template(toy):
    get_chat_template(toy, "chatml", map_eos_token=False)
    config = SimpleNamespace(eos_token_id=[toy.convert_tokens_to_ids("<unk>")])
    assert token_policy(toy, config).stop_tokens == ("</s>", "<unk>", "<|im_end|>")


def test_an_answer_that_does_not_stop_is_a_problem(toy, caplog):
    get_chat_template(
        toy, ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "eos_token")
    )
    assert any("does not stop generation" in problem for problem in token_policy(toy).problems)
    assert "will not learn to stop" in caplog.text


def test_a_template_that_begins_twice_is_a_problem(toy):
    toy.chat_template = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    assert token_policy(toy).problems == ("the chat template writes '<s>' twice",)


def test_without_eos_there_is_no_policy(toy):
    toy.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        token_policy(toy)


def test_a_prompt_loses_the_bos_that_its_tokenizer_adds(toy, real: RealTokenizers):
    assert remove_special_tokens(real("llama-spm"), "<s>Hi") == "Hi"
    assert remove_special_tokens(toy, "<s>Hi") == "<s>Hi"


def test_generation_stops_at_a_stop_word(toy):
    import torch

    criteria = create_stopping_criteria(toy, "Paris.")
    ids = toy(["The capital is Paris.", "The capital is Rome!!"])["input_ids"]
    length = min(map(len, ids))
    done = criteria(torch.tensor([row[-length:] for row in ids]), torch.zeros(2, len(toy)))
    assert done.tolist() == [True, False]
    assert create_stopping_criteria(toy)(torch.tensor([[5, toy.eos_token_id]]), torch.zeros(1, 1)).tolist() == [True]
    assert criteria(torch.tensor([[toy.bos_token_id]]), torch.zeros(1, 1)).tolist() == [False]
    with pytest.raises(ValueError, match="no tokens"):
        create_stopping_criteria(toy, "")
