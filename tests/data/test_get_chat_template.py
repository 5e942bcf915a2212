"""Giving a tokenizer a template: mapping, EOS, system message, processors, saving."""

import pytest
from transformers import PreTrainedTokenizerFast

from fastllm.chat_templates import CHAT_TEMPLATES, get_chat_template

from .conftest import RealTokenizers, talk

SHAREGPT = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}


def test_the_tokenizer_itself_comes_back_with_its_template(toy):
    assert get_chat_template(toy, "zephyr") is toy
    assert toy.apply_chat_template(talk("Hi", "Hello"), tokenize=False) == (
        "<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    )


def test_rows_of_other_keys_render_through_a_mapping_and_usual_rows_still_do(toy):
    get_chat_template(toy, "chatml", mapping=SHAREGPT)
    rows = [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    usual = talk("Hi", "Hello", system="S")
    expected = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    assert toy.apply_chat_template(rows, tokenize=False) == expected
    assert toy.apply_chat_template(usual, tokenize=False) == expected


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_every_template_takes_a_mapping(name: str, toy):
    plain = get_chat_template(toy, name).apply_chat_template(talk("Hi", "Hello"), tokenize=False)
    rows = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert get_chat_template(toy, name, mapping=SHAREGPT).apply_chat_template(rows, tokenize=False) == plain


def test_a_stop_word_that_is_a_token_becomes_the_eos(toy):
    size, stop = len(toy), toy.convert_tokens_to_ids("<|im_end|>")
    get_chat_template(toy, "chatml")
    assert (toy.eos_token, toy.eos_token_id, len(toy)) == ("<|im_end|>", stop, size)


def test_a_stop_word_that_is_none_takes_the_name_of_the_eos(toy, tmp_path):
    size, end = len(toy), toy.eos_token_id
    get_chat_template(toy, "gemma")
    assert (toy.eos_token, toy.eos_token_id, len(toy)) == ("<end_of_turn>", end, size)
    assert "</s>" not in toy.get_vocab()
    toy.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = talk("Hi", "Hello")
    assert loaded.apply_chat_template(messages)["input_ids"] == toy.apply_chat_template(messages)["input_ids"]
    assert loaded.eos_token_id == end


def test_the_eos_stays_on_request_and_with_templates_not_made_for_it(toy):
    get_chat_template(toy, "chatml", map_eos_token=False)
    assert toy.eos_token == "</s>"
    get_chat_template(toy, "llama-3")
    assert toy.eos_token == "</s>"


def test_settings_of_the_tokenizer_stay(toy):
    toy.padding_side = "left"
    get_chat_template(toy, "gemma")
    assert (toy.padding_side, toy.bos_token, toy.pad_token, toy.unk_token) == ("left", "<s>", "<pad>", "<unk>")


def test_a_gemma_tokenizer_takes_chatml_with_its_own_turn_tokens(real: RealTokenizers):
    tokenizer = real("llama-spm")
    names = {"<0x00>": "<start_of_turn>", "<0x01>": "<eos>"}
    from fastllm.text.tokenizer_setup import _rename_tokens

    _rename_tokens(tokenizer, names)
    get_chat_template(tokenizer, "chatml")
    assert tokenizer.eos_token == "<|im_end|>"
    assert {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_vocab())
    assert not {"<start_of_turn>", "<eos>"} & set(tokenizer.get_vocab())


def test_a_system_message_replaces_the_default_one(toy):
    get_chat_template(toy, "vicuna", system_message="It's me.\nObey.")
    assert toy.apply_chat_template(talk("Hi"), tokenize=False) == "<s>It's me.\nObey. USER: Hi "
    assert toy._system_message == "It's me.\nObey."
    get_chat_template(toy, "vicuna")
    assert "curious user" in toy.apply_chat_template(talk("Hi"), tokenize=False)


def test_a_system_message_without_a_place_is_told_and_not_used(toy, caplog):
    with caplog.at_level("WARNING", "fastllm"):
        get_chat_template(toy, "zephyr", system_message="Obey.")
    assert "system_message is not used" in caplog.text


def test_a_template_of_ones_own_with_its_stop_word(toy):
    jinja = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    get_chat_template(toy, (jinja, "eos_token"))
    assert toy.apply_chat_template(talk("Hi", "Yo"), tokenize=False) == "user: Hi</s>assistant: Yo</s>"
    get_chat_template(toy, [jinja, "<|im_end|>"])
    assert toy.eos_token == "<|im_end|>"


def test_a_template_of_ones_own_needs_the_message_it_leaves_room_for(toy):
    jinja = "{{ '{system_message}' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="no system message was given"):
        get_chat_template(toy, (jinja, "eos_token"))
    get_chat_template(toy, (jinja, "eos_token"), system_message="Obey. ")
    assert toy.apply_chat_template(talk("Hi"), tokenize=False) == "Obey. Hi"


def test_unknown_names_and_types_raise_as_unsloth_does_and_name_the_nearest(toy):
    with pytest.raises(KeyError, match="did you mean 'chatml'"):
        get_chat_template(toy, "chatlm")
    with pytest.raises(TypeError, match="int"):
        get_chat_template(toy, 3)
    with pytest.raises(TypeError, match="two strings"):
        get_chat_template(toy, ("{{ messages }}",))
    with pytest.raises(ValueError, match="mapping lacks"):
        get_chat_template(toy, "chatml", mapping={"role": "from"})


def test_an_end_of_turn_that_is_no_token_is_told(toy, caplog):
    with caplog.at_level("WARNING", "fastllm"):
        get_chat_template(toy, "phi-3")
    assert "'<|end|>' is no token of this vocabulary" in caplog.text


class Processor:
    """What a processor looks like from here."""

    chat_template = None

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer


def test_a_processor_and_its_tokenizer_both_take_the_template(toy):
    processor = Processor(toy)
    assert get_chat_template(processor, "gemma-3") is processor
    assert processor.chat_template == toy.chat_template == CHAT_TEMPLATES["gemma-3"][0]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert toy.apply_chat_template(parts, tokenize=False) == (
        "<s><start_of_turn>user\n<start_of_image>What?<end_of_turn>\n"
    )
