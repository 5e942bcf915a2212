"""Rows as they come: each gives a usable row or an error that names it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm._errors import FastllmError
from fastllm.chat_templates import chatml_to_sharegpt, get_chat_template, sharegpt_to_chatml, standardize_data_formats
from fastllm.data import DataReport, RowEncoder, load_chat_data, tokenize_chats
from fastllm.text.encoding import EncodedRow

from .conftest import make_toy_tokenizer, talk

TOKENIZER = get_chat_template(make_toy_tokenizer(), "chatml")
QWEN = get_chat_template(make_toy_tokenizer(), "qwen-3")

CONTROL = [
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "</s>",
    "<s>",
    "{{ 7 * 7 }}",
    "{% for %}",
    "</think>",
    "<think>",
    "\x00",
]
pieces = st.one_of(
    st.text(max_size=20),
    st.sampled_from(CONTROL),
    st.characters(categories=["Cs"]),  # lone surrogates
    st.characters(min_codepoint=0x100000, max_codepoint=0x10FFFF),  # the plane that marks answers
)
texts = st.lists(pieces, max_size=4).map("".join)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "critic", "", " "]) | anything
calls = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": anything})}) | anything,
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | anything}, optional={"tool_calls": calls | anything})
    | st.fixed_dictionaries({"from": roles, "value": texts | anything})
    | st.fixed_dictionaries(
        {"role": roles}, optional={"text": texts, "reasoning_content": texts | anything, "weight": anything}
    )
    | anything,
    max_size=5,
)
good_talks = st.lists(texts.filter(str.strip), min_size=2, max_size=6).map(lambda turns: talk(*turns))
rows = st.one_of(
    st.fixed_dictionaries(
        {"messages": messages | good_talks}, optional={"tools": anything, "chat_template_kwargs": anything}
    ),
    st.fixed_dictionaries({"conversations": messages | anything}),
    st.fixed_dictionaries({"prompt": texts | messages | anything, "completion": texts | messages | anything}),
    st.fixed_dictionaries({"instruction": texts | anything, "output": texts | anything}, optional={"input": anything}),
    st.fixed_dictionaries({"text": texts | anything}),
    st.fixed_dictionaries({"chosen": texts | messages, "rejected": texts | messages}),
    st.dictionaries(st.text(max_size=8), anything, max_size=4),
)
batches = st.lists(rows, min_size=1, max_size=20)
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))


def check_encoding(batch: list[dict]) -> None:
    for tokenizer in (TOKENIZER, QWEN):
        results = RowEncoder(tokenizer).encode(batch, range(100, 100 + len(batch)))
        assert len(results) == len(batch)
        for number, result in enumerate(results, start=100):
            if isinstance(result, EncodedRow):
                assert len(result.input_ids) == len(result.labels) > 0
                assert all(label in (-100, token) for token, label in zip(result.input_ids, result.labels, strict=True))
            else:
                assert isinstance(result, FastllmError)
                assert f"row {number}" in str(result)


@few
@given(batches)
def test_a_row_is_encoded_or_named(batch: list[dict]):
    check_encoding(batch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@many
@given(st.lists(rows, min_size=20, max_size=20))
def test_a_hundred_thousand_rows_are_encoded_or_named(batch: list[dict]):
    check_encoding(batch)


@few
@given(batches)
def test_loading_and_tokenising_keep_what_can_be_used_and_count_the_rest(batch: list[dict]):
    try:
        data = load_chat_data(batch, on_error="drop", show=False)
    except FastllmError:
        return
    assert 0 < len(data) <= len(batch)
    if {"messages", "text", "prompt"} & set(data.column_names) and "chosen" not in data.column_names:
        report = DataReport()
        try:
            tokens = tokenize_chats(data, TOKENIZER, on_error="drop", report=report, progress=False)
        except FastllmError:
            return
        assert len(tokens) == report.rows
        assert report.rows + len(report.dropped) + report.untrained == len(data)


@few
@given(good_talks)
def test_valid_conversations_lose_nothing(messages: list[dict]):
    (row,) = RowEncoder(TOKENIZER).encode([{"messages": messages}])
    spellable = all(
        ord(letter) < 0x100000 and not 0xD800 <= ord(letter) < 0xE000 for m in messages for letter in m["content"]
    )
    assert isinstance(row, EncodedRow) == spellable
    if isinstance(row, EncodedRow):
        text = TOKENIZER.decode(row.input_ids)
        assert text == TOKENIZER.apply_chat_template(messages, tokenize=False)
        trained = TOKENIZER.decode([token for token in row.labels if token != -100])
        assert all(message["content"] in trained for message in messages[1::2])


@few
@given(st.lists(st.text(max_size=30).filter(lambda text: "<|" not in text), min_size=1, max_size=5))
def test_the_tagged_form_is_read_back_as_it_was_written(turns: list[str]):
    row = {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]}
    assert chatml_to_sharegpt(sharegpt_to_chatml(row)) == row


@few
@given(st.lists(st.fixed_dictionaries({"conversations": messages}), min_size=1, max_size=5))
def test_standardising_changes_rows_or_names_the_problem(batch: list[dict]):
    try:
        result = standardize_data_formats(batch)
    except FastllmError:
        return
    assert len(result) == len(batch)


def test_texts_of_a_megabyte_are_encoded():
    (row,) = RowEncoder(TOKENIZER).encode([{"messages": talk("short", "word " * 200_000)}])
    assert TOKENIZER.decode([token for token in row.labels if token != -100]) == "word " * 200_000 + "<|im_end|>"


def test_half_a_surrogate_pair_is_named_with_its_place():
    (result,) = RowEncoder(TOKENIZER).encode([{"messages": talk("a\ud800", "b")}], [7])
    assert "row 7: the text has half a surrogate pair" in str(result)
