"""What the trainer will see: trained tokens in colour, lengths, shares."""

import io
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from fastllm.chat_templates import get_chat_template
from fastllm.data import load_chat_data, preview, tokenize_chats

from .conftest import talk

ROWS = [{"messages": talk("Hi 🎉", "Hello\n" * length)} for length in (1, 2, 4, 8, 16)]


@pytest.fixture
def chatml(toy):
    return get_chat_template(toy, "chatml")


def test_trained_text_stands_out(chatml):
    shown = preview(ROWS, 2, chatml, show=False)
    assert len(shown.rows) == 2
    assert [piece.text for piece in shown.rows[0] if piece.trained] == ["Hello\n<|im_end|>"]
    assert "row 0: <|im_start|>user↵\nHi 🎉<|im_end|>↵\n<|im_start|>assistant↵\n【Hello↵\n<|im_end|>】↵" in shown.text()
    assert "\x1b[32mHello" in shown.text(color=True)
    assert '<span title="' in shown.html() and "Hello" in shown.html() and "<|im_end|>" not in shown.html()


def test_lengths_and_shares_are_counted_over_all_rows(chatml):
    data = tokenize_chats(ROWS, chatml, progress=False)
    shown = preview(data, 1, chatml, show=False)
    assert shown.lengths == [len(ids) for ids in data["input_ids"]]
    trained = sum(label != -100 for row in data["labels"] for label in row)
    assert shown.share_trained == trained / sum(shown.lengths)
    assert f"{shown.share_trained:.1%} trained" in shown.summary()
    bars = shown.histogram().splitlines()
    assert sum(int(line.split()[-1]) for line in bars) == 5
    assert bars[0].strip().startswith(str(min(shown.lengths)))


def test_a_trainer_shows_its_own_data(chatml, capsys):
    trainer = SimpleNamespace(train_dataset=tokenize_chats(ROWS, chatml, progress=False), processing_class=chatml)
    preview(trainer, 1)
    printed = capsys.readouterr().out
    assert "【Hello↵\n<|im_end|>】" in printed
    assert "5 rows" in printed


def test_every_row_counts_where_nothing_is_masked(chatml):
    data = Dataset.from_dict({"input_ids": [[10, 11, 12]]})
    assert preview(data, 1, chatml, show=False).share_trained == 1


def test_a_notebook_shows_it_as_html(chatml, monkeypatch):
    shown = []

    class ZMQInteractiveShell:
        """What Jupyter's kernel calls its shell."""

    display = SimpleNamespace(HTML=lambda text: text, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=ZMQInteractiveShell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    result = preview([{"messages": talk("<b>Hi</b>", "Hello")}], 1, chatml)
    assert shown == [result.html()]
    assert "&lt;b&gt;Hi" in shown[0] and "1 row: " in shown[0]


def test_a_terminal_without_unicode_gets_ascii(chatml, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    preview(ROWS, 1, chatml)
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode("ascii")
    assert "Hello" in printed and "#" in printed


def test_streams_and_other_choices_of_turns(chatml):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    assert preview(stream, 1, chatml, show=False, train_on="all").share_trained == 1
    assert preview(stream, 1, chatml, show=False, max_length=5).lengths == [5] * 5


def test_loading_shows_an_example_with_its_trained_part(chatml, capsys):
    load_chat_data(ROWS, tokenizer=chatml)
    assert "【Hello↵\n<|im_end|>】" in capsys.readouterr().out


def test_what_is_missing_is_said(chatml):
    with pytest.raises(ValueError, match="tokenizer=tokenizer"):
        preview(ROWS)
    with pytest.raises(ValueError, match="one data set"):
        preview({"train": ROWS}, tokenizer=chatml)
    with pytest.raises(ValueError, match="row 0"):
        preview([{"messages": []}], tokenizer=chatml)
    with pytest.raises(TypeError, match="did you mean 'max_length'"):
        preview(ROWS, tokenizer=chatml, max_lenght=5)
