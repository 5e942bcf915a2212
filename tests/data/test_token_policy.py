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
    assert "'<pad>' pads batches from now on" in caplog.text and "since '<|im_end|>' ends answers" in caplog.text
    toy.pad_token = toy.eos_token
    assert "PAD '<|im_end|>' ends answers" in token_policy(toy, mend=False).problems[0]
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


@pytest.fixture
def full_vocabulary():
    """A tokenizer without any token to pad with, and a model with exactly a row for each of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate("abcdefgh")} | {"</s>": 8}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=9, num_key_value_heads=1, bos_token_id=None, eos_token_id=8, **shape)
    return tokenizer, LlamaForCausalLM(config)


def test_a_model_without_a_row_to_spare_grows_for_its_pad_token(full_vocabulary, caplog):
    from fastllm.models.tokenizer import settle_tokens

    tokenizer, model = full_vocabulary
    with caplog.at_level("INFO", "fastllm"):
        policy = settle_tokens(tokenizer, model, repair=True)
    assert policy.pad_token == "<|pad|>" and "added to its vocabulary, since there was none" in caplog.text
    assert model.get_input_embeddings().weight.shape[0] == 64 and "grew from 9 to 64 rows" in caplog.text
    assert model.config.pad_token_id == model.generation_config.pad_token_id == policy.pad_id == 9
    assert settle_tokens(tokenizer, model, repair=True).pad_origin == "the tokenizer's own"
    assert model.get_input_embeddings().weight.shape[0] == 64


def test_without_repair_the_problem_is_told_and_nothing_changes(full_vocabulary):
    from fastllm.models.tokenizer import settle_tokens

    tokenizer, model = full_vocabulary
    assert "there is no PAD token" in str(settle_tokens(tokenizer, model, repair=False))
    assert tokenizer.pad_token is None and model.get_input_embeddings().weight.shape[0] == 9


def test_generation_stops_where_the_template_ends_a_turn(toy):
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastllm.models.tokenizer import settle_tokens

    get_chat_template(toy, "chatml", map_eos_token=False)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(toy), num_key_value_heads=1, eos_token_id=toy.eos_token_id, **shape)
    model = LlamaForCausalLM(config)
    settle_tokens(toy, model, repair=True)
    assert model.generation_config.eos_token_id == toy.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    settle_tokens(toy, model, repair=True)
    assert model.generation_config.eos_token_id == toy.convert_tokens_to_ids(["</s>", "<|im_end|>"])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('never') }}", "refuses this conversation: never"),
        ("{% for m in messages %}", "can't be compiled"),
        ("{{ 'fixed' }}", "does not show the messages"),
    ],
)
def test_a_broken_template_is_a_problem_of_the_policy_not_an_error_of_loading(toy, template, problem):
    toy.chat_template = template
    assert any(problem in told for told in token_policy(toy).problems)
