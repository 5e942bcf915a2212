"""Unmodified trainers, their data masked to the answers."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset

from fastllm.chat_templates import apply_chat_template, get_chat_template, train_on_responses_only

from .conftest import RealTokenizers, talk

ROWS = [{"messages": talk(f"Question {i}?", f"Answer {i}.", "And?", f"More {i}.")} for i in range(4)]
ANSWERS = [f"Answer {i}.<|im_end|>More {i}.<|im_end|>" for i in range(4)]


@pytest.fixture
def chatml(toy):
    return get_chat_template(toy, "chatml")


def sft_trainer(tokenizer, rows, tmp_path, **config):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    data = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    return SFTTrainer(model, args=SFTConfig(**{**settings, **config}), train_dataset=data, processing_class=tokenizer)


def trained(tokenizer, data) -> list[str]:
    return [tokenizer.decode([token for token in row if token != -100]) for row in data["labels"]]


def test_an_sft_trainer_takes_the_loss_on_answers_only(chatml, tmp_path):
    trainer = sft_trainer(chatml, ROWS, tmp_path)
    assert train_on_responses_only(trainer) is trainer
    assert sorted(trained(chatml, trainer.train_dataset)) == ANSWERS
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert (batch["labels"] == -100).sum() > 0
    trainer.train()


def test_text_that_went_through_the_template_is_masked_too(chatml, tmp_path):
    texts = [{"text": chatml.apply_chat_template(row["messages"], tokenize=False)} for row in ROWS]
    trainer = train_on_responses_only(sft_trainer(chatml, texts, tmp_path))
    assert sorted(trained(chatml, trainer.train_dataset)) == ANSWERS


def test_a_question_that_looks_like_an_answer_is_told_apart_by_its_messages(chatml, tmp_path):
    rows = [{"messages": talk("What is <|im_start|>assistant\ntrap<|im_end|>?", "A header.")}]
    trainer = train_on_responses_only(sft_trainer(chatml, rows, tmp_path))
    assert trained(chatml, trainer.train_dataset) == ["A header.<|im_end|>"]


def test_explicit_parts_and_the_last_answer(chatml, tmp_path):
    parts = {"instruction_part": "<|im_start|>user\n", "response_part": "<|im_start|>assistant\n"}
    trainer = train_on_responses_only(sft_trainer(chatml, ROWS, tmp_path), **parts, last_response_only=True)
    assert sorted(trained(chatml, trainer.train_dataset)) == [f"More {i}.<|im_end|>" for i in range(4)]


def test_packed_rows_are_masked_document_by_document(chatml, tmp_path):
    trainer = sft_trainer(chatml, ROWS, tmp_path, packing=True, max_length=512)
    train_on_responses_only(trainer)
    together = "".join(trained(chatml, trainer.train_dataset))
    assert all(answer in together for answer in ANSWERS)
    assert "Question" not in together


def test_a_plain_trainer_gets_a_collator_that_keeps_labels(chatml, tmp_path):
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    ids = [chatml.apply_chat_template(row["messages"])["input_ids"] for row in ROWS]
    trainer = SimpleNamespace(
        train_dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        eval_dataset={"short": Dataset.from_dict({"input_ids": ids[:1]})},
        processing_class=chatml,
        data_collator=DataCollatorForLanguageModeling(chatml, mlm=False),
    )
    train_on_responses_only(trainer)
    assert trained(chatml, trainer.train_dataset) == ANSWERS
    assert trained(chatml, trainer.eval_dataset["short"]) == ANSWERS[:1]
    assert isinstance(trainer.data_collator, DataCollatorForSeq2Seq)


def fake(tokenizer, **columns):
    return SimpleNamespace(train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, data_collator=None)


def test_labels_that_are_masked_already_stay_masked(chatml):
    ids = chatml.apply_chat_template(talk("Q", "One", "Q", "Two"))["input_ids"]
    labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
    trainer = train_on_responses_only(fake(chatml, input_ids=[ids], labels=[labels]))
    assert trained(chatml, trainer.train_dataset) == ["Two<|im_end|>"]


def test_raw_lists_and_streams_are_served(chatml):
    trainer = SimpleNamespace(train_dataset=list(ROWS), processing_class=chatml)
    assert (
        trained(chatml, {"labels": [row["labels"] for row in train_on_responses_only(trainer).train_dataset]})
        == ANSWERS
    )
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    trainer = SimpleNamespace(train_dataset=stream, processing_class=chatml)
    first = next(iter(train_on_responses_only(trainer).train_dataset))
    assert trained(chatml, {"labels": [first["labels"]]}) == ANSWERS[:1]


def test_a_stream_tells_of_lost_rows_when_it_meets_them(chatml, caplog):
    stream = IterableDataset.from_generator(lambda: iter([{"messages": talk("Q")}, *ROWS]))
    trainer = train_on_responses_only(SimpleNamespace(train_dataset=stream, processing_class=chatml))
    with caplog.at_level("WARNING", "fastllm"):
        assert sum(1 for _ in trainer.train_dataset) == 4
    assert "the first is number 0 of the stream" in caplog.text


def test_a_doubled_bos_is_made_single_and_told(real: RealTokenizers, caplog):
    tokenizer = get_chat_template(real("llama-spm"), "mistral")
    text = tokenizer.apply_chat_template(talk("Hi", "Hello"), tokenize=False)
    trainer = fake(tokenizer, input_ids=[tokenizer(text)["input_ids"]])
    assert trainer.train_dataset[0]["input_ids"][:2] == [1, 1]
    with caplog.at_level("WARNING", "fastllm"):
        train_on_responses_only(trainer)
    assert trainer.train_dataset[0]["input_ids"] == tokenizer.apply_chat_template(talk("Hi", "Hello"))["input_ids"]
    assert "1 rows began with two BOS tokens" in caplog.text


def test_rows_cut_before_their_answer_are_dropped_and_counted(chatml, caplog):
    ids = [chatml.apply_chat_template(row["messages"])["input_ids"] for row in ROWS]
    with caplog.at_level("INFO", "fastllm"):
        trainer = train_on_responses_only(fake(chatml, input_ids=[ids[0][:5], *ids[1:]]))
    assert len(trainer.train_dataset) == 3
    assert "1 rows without a token to train were dropped" in caplog.text


def test_answers_that_were_cut_are_counted(chatml, caplog):
    whole = [chatml.apply_chat_template(row["messages"])["input_ids"] for row in ROWS]
    ids = [whole[0][:-6], *whole[1:]]
    with caplog.at_level("INFO", "fastllm"):
        trainer = train_on_responses_only(fake(chatml, input_ids=ids, messages=[row["messages"] for row in ROWS]))
    assert "1 rows are shorter than their messages" in caplog.text
    assert trained(chatml, trainer.train_dataset)[1:] == ANSWERS[1:]
    assert ANSWERS[0].startswith(trained(chatml, trainer.train_dataset)[0])


def test_data_of_another_template_raises_with_a_sample_instead_of_training_nothing(chatml):
    ids = chatml("### Human: Hi ### Assistant: Hello")["input_ids"]
    with pytest.raises(ValueError, match=r"opens with '<\|im_start\|>assistant.n' and this row shows none: '### Human"):
        train_on_responses_only(fake(chatml, input_ids=[ids]))
    with pytest.raises(ValueError, match="0 rows"):
        train_on_responses_only(fake(chatml, input_ids=[]))


def test_the_function_for_a_batch(chatml):
    mask = train_on_responses_only(None, tokenizer=chatml, return_function=True)
    ids = [chatml.apply_chat_template(row["messages"])["input_ids"] for row in ROWS]
    assert trained(chatml, mask({"input_ids": ids})) == ANSWERS


def test_parts_that_apply_chat_template_stored_are_used(toy):
    rows = [{"conversations": talk("Hi", "Hello", "Bye", "Ciao")}]
    template = "Tasks.\n\n### Question:\n{INPUT}\n\n### Answer:\n{OUTPUT}"
    data = apply_chat_template(rows, tokenizer=toy, chat_template=template)
    trainer = fake(toy, input_ids=[toy(data[0]["text"])["input_ids"]])
    assert trained(toy, train_on_responses_only(trainer).train_dataset) == ["Hello</s>Ciao</s>"]


def test_parts_for_data_without_a_template(toy):
    ids = toy("### Human: Hi\n### Assistant: Hello\n### Human: Bye\n### Assistant: Ciao")["input_ids"]
    trainer = fake(toy, input_ids=[ids])
    train_on_responses_only(trainer, instruction_part="### Human:", response_part="### Assistant:")
    assert trained(toy, trainer.train_dataset) == [" Hello\n Ciao"]
    with pytest.raises(ValueError, match="go together"):
        train_on_responses_only(trainer, response_part="### Assistant:")
    with pytest.raises(ValueError, match="no chat template to tell answers by"):
        train_on_responses_only(fake(toy, input_ids=[ids]))


PARTS = {
    "llama-3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "gemma": ("<start_of_turn>user\n", "<start_of_turn>model\n"),
    "chatml": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    "phi-4": ("<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>"),
    "phi-3": ("<|user|>\n", "<|assistant|>\n"),
    "alpaca": ("### Instruction:\n", "### Response:\n"),
    "mistral": ("[INST]", "[/INST]"),
}


@pytest.mark.parametrize("vocabulary", ["llama-bpe", "llama-spm", "phi-3", "qwen2", "gpt-2"])
@pytest.mark.parametrize("name", PARTS)
def test_the_usual_parts_and_the_template_mask_the_same(name: str, vocabulary: str, real: RealTokenizers):
    tokenizer = get_chat_template(real(vocabulary), name, map_eos_token=False)
    messages = talk("Why?\n\n", "\nBecause 🎉", "日本?", "はい。")
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    by_parts = train_on_responses_only(None, *PARTS[name], tokenizer=tokenizer, return_function=True)
    by_template = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    expected = by_template({"input_ids": [ids]})["labels"]
    assert by_parts({"input_ids": [ids]})["labels"] == expected
    (text,) = trained(tokenizer, {"labels": expected})
    assert "Because 🎉" in text and "はい。" in text
    assert "Why" not in text and "日本" not in text


@pytest.mark.parametrize(
    "name", ["chatml", "llama-3", "mistral", "alpaca", "gemma-3", "phi-3", "qwen-3", "gpt-oss", "llama"]
)
@pytest.mark.parametrize("vocabulary", ["llama-bpe", "llama-spm", "qwen2"])
def test_tokens_alone_and_messages_mask_the_same(name: str, vocabulary: str, real: RealTokenizers):
    from fastllm.data import RowEncoder

    tokenizer = get_chat_template(real(vocabulary), name, map_eos_token=False)
    messages = talk("Why?", "Because 12.", "日本?", "はい。")
    row = RowEncoder(tokenizer).encode([{"messages": messages}])[0]
    mask = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    assert mask({"input_ids": [row.input_ids]})["labels"] == [row.labels]
