"""One call for whatever holds training data: files, lists, data sets, streams; every format."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from fastllm.data import FORMATS, detect_format, load_chat_data, messages_of
from fastllm.text.formats import columns_read

from .conftest import talk

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}

EXAMPLES = {
    "text": ({"text": "Once upon a time"}, {"text": "Once upon a time"}),
    "alpaca": (
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"messages": talk("Add\n\n1 and 2", "3")},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": "x"},
        {"messages": talk("Hi", "Hello")},
    ),
    "messages": ({"messages": talk("Hi", "Hello", system="S")}, {"messages": talk("Hi", "Hello", system="S")}),
    "prompt-completion": ({"prompt": "Hi", "completion": "Hello"}, {"prompt": "Hi", "completion": "Hello"}),
    "preference": (
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What."},
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What."},
    ),
    "kto": (
        {"prompt": "Hi", "completion": "Hello", "label": 1},
        {"prompt": "Hi", "completion": "Hello", "label": True},
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_told_and_brought_into_its_form(name: str, caplog):
    row, expected = EXAMPLES[name]
    with caplog.at_level("INFO", "fastllm"):
        data = load_chat_data([row, row])
    assert list(data) == [expected, expected]
    assert f"2 rows, format {name} (detected from" in caplog.text
    assert "an example" in caplog.text


def write(folder: Path, ending: str, rows: list[dict]) -> Path:
    path = folder / f"data{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif ending == ".json":
        path.write_text("\ufeff" + json.dumps(rows, indent=1), encoding="utf-8")
    elif ending == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path, sep="\t" if ending == ".tsv" else ",", index=False)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_files_of_rows(ending: str, tmp_path: Path):
    rows = [{"instruction": 'Ünï, "quoted"\nlines', "output": "🎉"}, {"instruction": "B", "output": "b"}]
    data = load_chat_data(write(tmp_path, ending, rows), show=False)
    assert data[0]["messages"] == talk('Ünï, "quoted"\nlines', "🎉")
    assert len(data) == 2


def test_plain_text_files_become_paragraphs(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("One\nparagraph.\n\n\nAnother.\n", encoding="utf-8")
    assert load_chat_data(path, show=False)["text"] == ["One\nparagraph.", "Another."]


def test_a_saved_data_set_and_splits(tmp_path: Path):
    data = Dataset.from_list([EXAMPLES["alpaca"][0]])
    data.save_to_disk(tmp_path / "saved")
    assert load_chat_data(tmp_path / "saved", show=False)[0] == EXAMPLES["alpaca"][1]
    splits = load_chat_data(DatasetDict(train=data, test=data), show=False)
    assert isinstance(splits, DatasetDict)
    assert splits["test"][0] == EXAMPLES["alpaca"][1]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_folder_of_files_is_read_in_the_order_of_their_names(ending: str, tmp_path: Path):
    for name in ("b", "a"):
        write(tmp_path, ending, [{"text": name}]).rename(tmp_path / f"{name}{ending}")
    (tmp_path / "README.md").write_text("# Data")
    assert load_chat_data(tmp_path, show=False)["text"] == ["a", "b"]
    (tmp_path / "c.txt").write_text("c")
    with pytest.raises(ValueError, match="files of several kinds"):
        load_chat_data(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no file of training data"):
        load_chat_data(tmp_path)


def test_tables_of_columns():
    columns = {"instruction": ["A", "B"], "output": ["a", "b"]}
    expected = [{"messages": talk("A", "a")}, {"messages": talk("B", "b")}]
    assert list(load_chat_data(columns, show=False)) == expected
    frame = pytest.importorskip("pandas").DataFrame(columns, index=[7, 9])
    assert list(load_chat_data(frame, show=False)) == expected


def test_streams_stay_streams_and_read_nothing_ahead(tmp_path: Path):
    data = load_chat_data(write(tmp_path, ".jsonl", [EXAMPLES["sharegpt"][0]] * 3), streaming=True, show=False)
    assert isinstance(data, IterableDataset)
    assert list(data) == [EXAMPLES["sharegpt"][1]] * 3
    read = []

    def endless():
        while True:
            read.append(1)
            yield EXAMPLES["sharegpt"][0]

    stream = load_chat_data(IterableDataset.from_generator(endless), show=False)
    assert next(iter(stream)) == EXAMPLES["sharegpt"][1]
    assert len(read) < 2500


def test_rows_keep_their_own_keys_and_nothing_of_their_neighbours():
    rows = [
        {"messages": [*talk("Q"), CALL, {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
    ]
    data = load_chat_data(rows, show=False)
    assert data[0]["messages"][1] == {k: v for k, v in CALL.items() if v is not None} | {"content": None}
    assert data[0]["tools"] == [{"name": "f"}]
    assert data[1]["messages"] == rows[1]["messages"]
    assert data[1]["tools"] is None


def test_columns_may_be_renamed_and_the_format_named():
    rows = [{"frage": "Hi", "antwort": "Hello"}]
    names = {"frage": "instruction", "antwort": "output"}
    assert load_chat_data(rows, columns=names, show=False)[0] == {"messages": talk("Hi", "Hello")}
    both = [{"text": "raw", "prompt": "Hi", "completion": "Hello"}]
    assert load_chat_data(both, format="text", show=False)[0] == {"text": "raw"}


def test_preferences_of_messages_are_kept_as_messages():
    row = {"chosen": talk("Q", "good"), "rejected": talk("Q", "bad")}
    assert load_chat_data([row], show=False)[0] == row
    with pytest.raises(ValueError, match="teaches nothing"):
        load_chat_data([{"chosen": "same", "rejected": "same"}])


def test_other_names_of_roles_and_keys_are_known():
    talked = [
        {"speaker": "Human", "text": "Hi"},
        {"speaker": "model", "text": "Yo"},
        {"speaker": "observation", "text": "1"},
    ]
    assert [message["role"] for message in messages_of({"dialogue": talked})] == ["user", "assistant", "tool"]
    row = {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]}
    assert load_chat_data([row], show=False)[0]["messages"][0] == {"role": "system", "content": "Be kind."}


def test_context_and_system_columns_join_the_conversation_and_what_is_not_used_is_told(caplog):
    dolly = {"instruction": "Which?", "context": "A or B.", "response": "A", "category": "qa"}
    orca = {"id": 1, "system_prompt": "Be brief.", "question": "Why?", "response": "So."}
    with caplog.at_level("INFO", "fastllm"):
        assert load_chat_data([dolly], show=False)[0] == {"messages": talk("Which?\n\nA or B.", "A")}
        assert load_chat_data([orca], show=False)[0] == {"messages": talk("Why?", "So.", system="Be brief.")}
    assert "columns not used: 'category'" in caplog.text and "columns not used: 'id'" in caplog.text
    assert columns_read(EXAMPLES["alpaca"][0], "alpaca") == {"instruction", "input", "output"}


@pytest.mark.parametrize("name", FORMATS)
def test_no_column_of_a_plain_example_is_left_out(name: str):
    row, _ = EXAMPLES[name]
    assert set(row) - columns_read(row, name) <= {"id"}


def test_conversations_that_a_table_holds_as_json(tmp_path: Path):
    path = tmp_path / "talks.csv"
    Dataset.from_dict({"messages": [json.dumps(talk("Hi", "Hello"))]}).to_csv(path, index=False)
    assert load_chat_data(path, show=False)[0] == {"messages": talk("Hi", "Hello")}
    with pytest.raises(ValueError, match="no known format"):
        load_chat_data([{"messages": "[no json"}])


def test_preferences_whose_prompt_is_text_and_whose_answers_are_messages():
    expected = {"prompt": talk("Q"), "chosen": talk("Q", "good")[1:], "rejected": talk("Q", "bad")[1:]}
    whole = {"prompt": "Q", "prompt_id": "7", "chosen": talk("Q", "good"), "rejected": talk("Q", "bad")}
    answers = {"question": "Q", "chosen": talk("Q", "good")[1:], "rejected": talk("Q", "bad")[1:]}
    assert load_chat_data([whole], show=False)[0] == load_chat_data([answers], show=False)[0] == expected
    with pytest.raises(ValueError, match="begin with messages that are not the prompt"):
        load_chat_data([{**whole, "prompt": "other"}])
    with pytest.raises(ValueError, match="both be text or both be messages"):
        load_chat_data([{**whole, "rejected": "bad"}])


def test_a_system_column_makes_preferences_conversations():
    rows = [{"system": system, "question": "Q", "chosen": "good", "rejected": "bad"} for system in ("S", "")]
    first, second = load_chat_data(rows, show=False)
    assert first["prompt"] == talk("Q", system="S") and second["prompt"] == talk("Q")
    assert first["chosen"] == talk("Q", "good")[1:]


def test_columns_that_only_later_rows_have_are_kept_or_named(tmp_path: Path):
    later = {
        "messages": talk("Hi", "Hello"),
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    rows = [{"messages": talk("A", "B")}, later]
    data = load_chat_data(rows, show=False)
    assert data[1] == later and data[0]["tools"] is None
    assert load_chat_data(rows[:1], show=False).column_names == ["messages"]
    with pytest.raises(ValueError, match="row 1: column 'chat_template_kwargs' is in this row and not in the first"):
        list(load_chat_data(write(tmp_path, ".jsonl", rows), streaming=True, show=False))
    with pytest.raises(ValueError, match="row 1: column 'prompt' is missing here"):
        load_chat_data([{"prompt": "p", "chosen": "c", "rejected": "r"}, {"chosen": "c", "rejected": "r"}])


def test_rows_that_cant_be_used_are_named_or_left_out_as_asked(caplog):
    good = {"messages": talk("Hi", "Hello")}
    bad = [{"messages": [{"role": "user"}]}, {"messages": None}, {"messages": [{"role": 3, "content": "x"}]}]
    with pytest.raises(
        ValueError, match=r"3 rows are no messages rows:\n  row 1: message 0 \(user\) has no content\n  row 2"
    ):
        load_chat_data([good, *bad], show=False)
    with caplog.at_level("INFO", "fastllm"):
        assert len(load_chat_data([good, *bad], on_error="drop", show=False)) == 1
    assert "3 rows left out" in caplog.text


def test_what_is_no_data_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        load_chat_data(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="0 rows"):
        load_chat_data([])
    with pytest.raises(ValueError, match=r"no known format has the columns \['body', 'headline'\]"):
        load_chat_data([{"headline": "x", "body": "y"}])
    with pytest.raises(ValueError, match="did you mean 'alpaca'"):
        load_chat_data([{}], format="alpacca")
    with pytest.raises(NotImplementedError, match=r"no reader for '.docx'"):
        (tmp_path / "a.docx").write_text("x")
        load_chat_data(tmp_path / "a.docx")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2: this is no JSON"):
        load_chat_data(broken)
    array = tmp_path / "array.json"
    array.write_text('[{"text": "fine"}, 3]')
    with pytest.raises(ValueError, match=r"array\.json, entry 1: a row must be a JSON object, not int"):
        load_chat_data(array)


def test_detection_prefers_the_more_specific_format():
    assert detect_format(["prompt", "completion", "text"], {}) == "prompt-completion"
    assert detect_format(["prompt", "chosen", "rejected"], {}) == "preference"
    assert detect_format(["messages", "text"], {"messages": talk("Q")}) == "messages"
    assert detect_format(["question", "answer"], {}) == "alpaca"
