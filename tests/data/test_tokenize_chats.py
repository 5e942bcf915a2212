"""Rows to input_ids and labels: formats, choices of what is trained, lengths, problems counted and told."""

import pytest
from datasets import Dataset, IterableDataset

from fastllm.chat_templates import get_chat_template
from fastllm.data import DataReport, RowEncoder, tokenize_chats

from .conftest import RealTokenizers, talk


@pytest.fixture
def chatml(toy):
    return get_chat_template(toy, "chatml")


def trained(tokenizer, row: dict) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def encode(tokenizer, row: dict, **options) -> dict:
    return RowEncoder(tokenizer, **options).encode([row])[0]._asdict()


def test_a_list_becomes_a_data_set_of_ids_and_labels(chatml):
    data = tokenize_chats([{"messages": talk("Hi", "Hello")}], chatml, progress=False)
    assert isinstance(data, Dataset)
    assert data.column_names == ["input_ids", "labels"]
    assert data[0]["input_ids"] == chatml.apply_chat_template(talk("Hi", "Hello"))["input_ids"]
    assert trained(chatml, data[0]) == "Hello<|im_end|>"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("responses", "One<|im_end|>Two<|im_end|>"), ("last", "Two<|im_end|>"),
     ("all", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nOne<|im_end|>\n"
             "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n")],
)  # fmt: skip
def test_the_choice_of_turns(train_on: str, expected: str, chatml):
    row = {"messages": talk("Q", "One", "Q2", "Two")}
    assert trained(chatml, encode(chatml, row, train_on=train_on)) == expected


def test_marked_turns_are_trained_alone(chatml):
    messages = talk("Q", "One", "Q2", "Two")
    messages[1]["train"] = True
    assert trained(chatml, encode(chatml, {"messages": messages}, train_on="marked")) == "One<|im_end|>"
    messages = talk("Q", "One", "Q2", "Two")
    messages[1]["weight"] = 0
    assert trained(chatml, encode(chatml, {"messages": messages})) == "Two<|im_end|>"


def test_every_format_is_read(chatml):
    assert trained(chatml, encode(chatml, {"prompt": "Say hi: ", "completion": "hi"})) == "hi<|im_end|>"
    conversational = {"prompt": talk("Q", "One", "Q2"), "completion": [{"role": "assistant", "content": "Two"}]}
    assert trained(chatml, encode(chatml, conversational)) == "Two<|im_end|>"
    sharegpt = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "One"}]}
    assert trained(chatml, encode(chatml, sharegpt)) == "One<|im_end|>"
    assert trained(chatml, encode(chatml, {"text": "Once upon a time"})) == "Once upon a time<|im_end|>"


def test_plain_text_gets_one_bos_and_one_eos(real: RealTokenizers):
    tokenizer = real("llama-spm")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text in ("Hello", "<s>Hello", "Hello</s>", "<s>Hello</s>"):
        ids = encode(tokenizer, {"text": text})["input_ids"]
        assert (ids[0], ids[-1], ids.count(begin), ids.count(end)) == (begin, end, 1, 1)


def test_tools_and_template_variables_of_a_row_are_used(toy):
    get_chat_template(toy, "qwen-3")
    tool = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}
    for tools in ([tool], '[{"type": "function", "function": {"name": "sky"}}]'):
        text = RowEncoder(toy).text_of({"messages": talk("Q", "A"), "tools": tools}).text
        assert '"name": "sky"' in text
    encoder = RowEncoder(
        toy, chat_template="{{ mood }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    row = {"messages": talk("Q", "A"), "chat_template_kwargs": {"mood": "happy "}}
    assert encoder.text_of(row).text.startswith("happy Q")


@pytest.mark.parametrize(
    "vocabulary", ["llama-spm", "phi-3", "qwen2", "gpt-2", "llama-bpe", "deepseek-llm", "starcoder"]
)
@pytest.mark.parametrize("name", ["chatml", "alpaca", "llama", "phi-3"])
def test_trained_tokens_spell_the_answers_with_real_tokenizers(name: str, vocabulary: str, real: RealTokenizers):
    tokenizer = get_chat_template(real(vocabulary), name, map_eos_token=False)
    asked = ["Why? 🎉", "Ünïcode, 日本語?"]
    said = ["Because of 12345 reasons.", "はい、そうです 🎉"]
    row = encode(tokenizer, {"messages": talk(asked[0], said[0], asked[1], said[1])})
    text = trained(tokenizer, row)
    assert all(answer in text for answer in said)
    assert "Why" not in text and "Ünïcode" not in text and "assistant" not in text and "user" not in text


def test_rows_too_long_are_cut_and_counted(chatml, caplog):
    rows = [
        {"messages": talk("Q", "A")},
        {"messages": talk("Q", "word " * 100)},
        {"messages": talk("word " * 100, "A")},
    ]
    report = DataReport()
    with caplog.at_level("INFO", "fastllm"):
        data = tokenize_chats(rows, chatml, max_length=40, report=report, progress=False)
    assert [len(ids) for ids in data["input_ids"]] == [len(data[0]["input_ids"]), 40]
    assert (report.rows, report.truncated, report.untrained, report.untrained_by_length) == (2, 1, 1, 1)
    assert report.first_untrained == [2]
    assert "1 rows have no token to train (rows 2...), 1 of them because max_length" in caplog.text


def test_rows_too_long_may_be_left_out_or_refused(chatml):
    rows = [{"messages": talk("Q", "A")}, {"messages": talk("Q", "word " * 100)}]
    report = DataReport()
    assert len(tokenize_chats(rows, chatml, max_length=40, too_long="drop", report=report, progress=False)) == 1
    assert report.too_long == 1
    with pytest.raises(ValueError, match=r"row 1: .* more than max_length=40"):
        tokenize_chats(rows, chatml, max_length=40, too_long="error", progress=False)


def test_rows_without_an_answer_are_never_silent(chatml, caplog):
    rows = [{"messages": talk("Q", "A")}, {"messages": talk("Q")}, {"messages": talk("Q", "")}]
    with caplog.at_level("WARNING", "fastllm"):
        assert len(tokenize_chats(rows, chatml, progress=False)) == 1
    assert "rows without a token to train are left out; the first is row 1" in caplog.text
    assert len(tokenize_chats(rows, chatml, untrained="keep", progress=False)) == 3
    with pytest.raises(ValueError, match="row 1: no token of the row is trained: it has no answer"):
        tokenize_chats(rows, chatml, untrained="error", progress=False)
    with pytest.raises(ValueError, match="no row is left"):
        tokenize_chats(rows[1:], chatml, progress=False)


def test_messages_that_a_template_leaves_out_are_told(toy, caplog):
    get_chat_template(toy, "phi-4")
    rows = [{"messages": [*talk("Q"), {"role": "critic", "content": "Hm"}, {"role": "assistant", "content": "A"}]}]
    with caplog.at_level("WARNING", "fastllm"):
        tokenize_chats(rows, toy, progress=False)
    assert "row 0: a message of role 'critic' does not appear" in caplog.text


def test_bad_rows_raise_together_with_their_numbers_or_are_left_out(chatml, caplog):
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": 5}]}, {"foo": 1}, {"messages": "x"}]
    rows = [{"messages": talk("Q", "A")}, *bad]
    with pytest.raises(
        ValueError, match=r"4 rows can't be used:\n  row 1: .*no messages\n  row 2: message 0 has content"
    ):
        tokenize_chats(rows, chatml, progress=False)
    report = DataReport()
    assert len(tokenize_chats(rows, chatml, on_error="drop", report=report, progress=False)) == 1
    assert len(report.dropped) == 4
    assert "4 rows could not be read" in caplog.text or "4 rows could not be read" in str(report)


def test_a_stream_is_read_as_it_is_consumed(chatml):
    seen = []

    def rows():
        for number in range(5000):
            seen.append(number)
            yield {"messages": talk("Q", f"answer {number}")}

    stream = IterableDataset.from_generator(rows)
    report = DataReport()
    tokens = tokenize_chats(stream, chatml, batch_size=10, report=report)
    assert isinstance(tokens, IterableDataset)
    seen.clear()
    first = next(iter(tokens))
    assert trained(chatml, first) == "answer 0<|im_end|>"
    assert len(seen) < 50
    assert sum(1 for _ in tokens) == 5000


def test_splits_are_tokenised_one_by_one(chatml):
    data = Dataset.from_list([{"messages": talk("Q", "A")}])
    result = tokenize_chats({"train": data, "test": data}, chatml, progress=False)
    assert set(result) == {"train", "test"}
    assert len(result["test"]) == 1


def test_choices_are_checked(chatml):
    with pytest.raises(ValueError, match="too_long='cut'"):
        tokenize_chats([], chatml, too_long="cut")
    with pytest.raises(ValueError, match="train_on='answers'"):
        RowEncoder(chatml, train_on="answers")
    with pytest.raises(ValueError, match="0 rows"):
        tokenize_chats([], chatml, progress=False)


def test_a_tokenizer_without_template_says_how_to_get_one(toy):
    with pytest.raises(ValueError, match="get_chat_template"):
        tokenize_chats([{"messages": talk("Q", "A")}], toy, progress=False)
