"""Columns to conversations, conversations to role and content, and the tagged text form."""

import pytest
from datasets import Dataset, IterableDataset

from fastllm.chat_templates import (
    chatml_to_sharegpt,
    sharegpt_to_chatml,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)

PROMPT = "{instruction}[[\nYour input is:\n{input}]]"
ROWS = [{"instruction": f"I{i}", "input": "" if i % 2 else f"in{i}", "output": f"O{i}"} for i in range(6)]


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_an_optional_block_goes_when_its_first_column_is_empty():
    rows = to_sharegpt(Dataset.from_list(ROWS), merged_prompt=PROMPT)
    assert rows.column_names == ["conversations"]
    assert rows["conversations"][:2] == [turn("I0\nYour input is:\nin0", "O0"), turn("I1", "O1")]


def test_without_a_prompt_one_column_is_the_question():
    assert to_sharegpt(Dataset.from_list(ROWS))["conversations"][3] == turn("I3", "O3")


def test_the_prompt_may_name_any_columns_and_none_is_nothing():
    rows = [{"a": 1, "b": None, "output": 2.5}]
    prompt = "[[{b}: ]]{a} of {b}[[ and {a} with {b}]]"
    assert to_sharegpt(rows, merged_prompt=prompt)[0]["conversations"] == turn("1 of  and 1 with ", "2.5")


def test_extension_repeats_each_row_n_times_in_unsloths_order():
    rows = to_sharegpt(Dataset.from_list(ROWS), merged_prompt="{instruction}", conversation_extension=3)
    asked = [[message["value"] for message in talk[::2]] for talk in rows["conversations"]]
    assert asked == [
        ["I0", "I0", "I1"], ["I1", "I3", "I0"], ["I2", "I5", "I4"], ["I3", "I4", "I3"], ["I4", "I1", "I2"],
        ["I5", "I2", "I5"],
    ]  # fmt: skip
    assert rows["conversations"][0][1] == {"from": "gpt", "value": "O0"}


def test_merging_rows_shows_each_once():
    rows = to_sharegpt(Dataset.from_list(ROWS), conversation_extension=4, merge_rows=True)
    assert [len(talk) for talk in rows["conversations"]] == [8, 4]
    assert sorted(m["value"] for talk in rows["conversations"] for m in talk[1::2]) == [f"O{i}" for i in range(6)]


def test_other_columns_stay_on_request():
    rows = to_sharegpt(Dataset.from_list(ROWS), remove_unused_columns=False, conversation_extension=2)
    assert rows.column_names == ["instruction", "input", "output", "conversations"]
    assert rows[2]["instruction"] == "I2"


def test_lists_and_streams_stay_what_they_are():
    assert to_sharegpt(ROWS)[1] == {"conversations": turn("I1", "O1")}
    stream = to_sharegpt(Dataset.from_list(ROWS).to_iterable_dataset())
    assert isinstance(stream, IterableDataset)
    assert next(iter(stream)) == {"conversations": turn("I0", "O0")}
    with pytest.raises(NotImplementedError, match="stream"):
        to_sharegpt(stream.rename_column("conversations", "x"), "{x}", output_column_name="x", conversation_extension=2)


def test_mistakes_raise_the_types_that_unsloth_raises():
    data = Dataset.from_list(ROWS)
    with pytest.raises(KeyError, match="no column 'nope'"):
        to_sharegpt(data, merged_prompt="{nope}")
    with pytest.raises(IndexError, match="names no column"):
        to_sharegpt(data, merged_prompt="{instruction}[[ no column ]]")
    with pytest.raises(TypeError, match="already holds conversations"):
        to_sharegpt(to_sharegpt(data))


def test_from_and_value_become_role_and_content():
    data = Dataset.from_list([{"conversations": turn("Hi", "Hello"), "id": 1}])
    assert standardize_sharegpt(data)[0] == {
        "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": 1,
    }  # fmt: skip


def test_a_messages_column_and_further_keys_are_served_too():
    message = {"role": "human", "content": "Hi", "weight": 0}
    call = {"role": "gpt", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    (row,) = standardize_data_formats([{"messages": [message, call]}])
    assert row["messages"] == [
        {"role": "user", "content": "Hi", "weight": 0},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    ]


def test_unknown_keys_are_told_apart_by_their_values():
    rows = [
        {"conversations": [{"who": "user", "said": f"Hi {i}"}, {"who": "gpt", "said": f"Yo {i}"}]} for i in range(3)
    ]
    assert standardize_sharegpt(rows)[2]["conversations"][1] == {"role": "assistant", "content": "Yo 2"}


def test_aliases_extend_to_the_roles_of_ones_own_data():
    rows = [{"conversations": [{"from": "pupil", "value": "Hi"}, {"from": "teacher", "value": "Yo"}]}]
    with pytest.raises(TypeError, match="'pupil'"):
        standardize_sharegpt(rows)
    (row,) = standardize_sharegpt(rows, aliases_for_user=["pupil"], aliases_for_assistant=["teacher"])
    assert [message["role"] for message in row["conversations"]] == ["user", "assistant"]


def test_a_processor_gets_parts():
    class Processor:
        image_processor = object()

    data = Dataset.from_list([{"conversations": turn("Hi", "Hello")}])
    assert standardize_data_formats(data, tokenizer=Processor())[0]["conversations"][0] == {
        "role": "user", "content": [{"type": "text", "text": "Hi"}],
    }  # fmt: skip


def test_data_without_conversations_comes_back_as_it_is():
    data = Dataset.from_list(ROWS)
    assert standardize_sharegpt(data) is data


def test_dicts_of_splits_and_streams_are_served():
    data = Dataset.from_list([{"conversations": turn("Hi", "Hello")}])
    splits = standardize_sharegpt({"train": data, "test": data})
    assert splits["test"][0]["conversations"][0]["role"] == "user"
    assert next(iter(standardize_sharegpt(data.to_iterable_dataset())))["conversations"][1]["content"] == "Hello"


def test_the_tagged_text_form_and_the_way_back():
    row = {"conversations": turn("Hi\nthere", "Hello")}
    text = sharegpt_to_chatml(row)
    assert text == "<|system|>You are a helpful assistant.<|end|>\n<|user|>Hi\nthere<|end|>\n<|assistant|>Hello<|end|>"
    assert chatml_to_sharegpt(text) == row
    assert chatml_to_sharegpt(text, include_system=True)["conversations"][0]["from"] == "system"
    assert sharegpt_to_chatml(row, system_message=None).startswith("<|user|>")
    assert sharegpt_to_chatml([row, row]) == [text, text]
    assert chatml_to_sharegpt([text]) == [row]
    model = [{"from": "system", "value": "S"}, {"from": "model", "value": "Yo"}]
    assert sharegpt_to_chatml(model) == "<|system|>S<|end|>\n<|assistant|>Yo<|end|>"


def test_text_without_tags_is_refused():
    with pytest.raises(ValueError, match="not a series"):
        chatml_to_sharegpt("Hello")
    with pytest.raises(ValueError, match="not a series"):
        chatml_to_sharegpt("<|user|>Hi<|end|> and more")
