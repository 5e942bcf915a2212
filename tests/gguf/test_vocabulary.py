"""Tokenizers: llama.cpp cuts text into the ids of the original tokenizer, for real vocabularies and for tiny ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers, processors
from transformers import AutoTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from fastllm._errors import TokenizerError
from fastllm.gguf import export_gguf
from fastllm.gguf.pre_tokenizers import pre_tokenizer_name
from fastllm.gguf.vocabulary import SavedTokenizer, vocabulary_metadata

from . import models

TEXTS = [
    "",
    " ",
    "  two spaces and a tab\t",
    "Hello, world! It's 12345 o'clock; DON'T.",
    "def f(x):\n    return x**2\n\n\n# done",
    "🚀 emojis 😶‍🌫️, ñandú, 北京 1984年, កាន់តែពិសេស, \u00e9 and e\u0301",
    "\n\n\n \n\t\n",
    "a" * 100,
]
CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It's 4.\n"},
    {"role": "user", "content": "Are you sure?"},
]
ADDED = ["<|custom|>", "<think>", "[TOOL]"]


def write_model(folder: Path, path: Path, num_rows: int) -> Path:
    """A GGUF file with the tokenizer saved in `folder` and one small layer."""
    config = {
        "model_type": "llama", "vocab_size": num_rows, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    layer, square = "model.layers.0", torch.zeros(32, 32)
    tensors = {
        "model.embed_tokens.weight": torch.zeros(num_rows, 32),
        "model.norm.weight": torch.ones(32),
        f"{layer}.input_layernorm.weight": torch.ones(32),
        f"{layer}.post_attention_layernorm.weight": torch.ones(32),
        **{f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"},
        **{f"{layer}.mlp.{name}_proj.weight": square for name in ("gate", "up", "down")},
    }
    export_gguf({path: "q8_0"}, config=config, tokenizer_dir=folder, tensors=tensors.items())
    return path


@pytest.fixture(scope="session")
def saved(real_vocab, tmp_path_factory):
    """`saved(name)`: (folder of the tokenizer in transformers' files, its test texts and ids)."""
    done = {}

    def save(name: str):
        if name not in done:
            path, texts, ids = real_vocab(name)
            tokenizer = TokenizersBackend.from_pretrained(path.parent, gguf_file=path.name)
            _repair(name, tokenizer)
            folder = tmp_path_factory.mktemp(name)
            tokenizer.save_pretrained(folder)
            done[name] = folder, texts, ids
        return done[name]

    return save


def _repair(name: str, tokenizer) -> None:
    """What transformers' reader of llama.cpp's vocabulary files leaves different from the original tokenizer."""
    backend = tokenizer.backend_tokenizer
    if name == "llama-bpe":
        backend.model.ignore_merges = True
        bos = tokenizer.bos_token
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    if name == "llama-spm":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None


REAL = {"gpt-2": "gpt-2", "llama-bpe": "llama-bpe", "qwen2": "qwen2", "qwen35": "qwen35"}
REAL_SENTENCEPIECE = ("llama-spm", "phi-3", "gemma-4")
LARGE = ("qwen35", "gemma-4")  # read by the same code as their smaller siblings


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in (*REAL, *REAL_SENTENCEPIECE)],
)
def test_real_vocabularies_give_the_original_ids(judge, saved, tmp_path, name):
    folder, texts, ids = saved(name)
    tokenizer = TokenizersBackend.from_pretrained(folder)
    tokenizer.add_tokens(ADDED[1:])
    tokenizer.add_tokens(ADDED[:1], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    num_rows = len(tokenizer) + 7
    with judge.loaded(write_model(tmp_path, tmp_path / "a.gguf", num_rows), num_rows) as loaded:
        assert [loaded.tokenize(text) for text in texts] == ids
        for text in (*TEXTS, *(f"{a} before{b}behind {a}" for a in ADDED for b in ADDED)):
            if name in REAL or not any(token in text for token in ADDED):
                assert loaded.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
        text = "With special tokens."
        assert loaded.tokenize(text, special=True) == tokenizer.encode(text)
        if tokenizer.chat_template and name != "gemma-4":  # whose template writes out a system turn of its own
            assert chat_ids(loaded) == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    if name in REAL:
        assert pre_tokenizer_name(json.loads((folder / "tokenizer.json").read_text())) == REAL[name]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_byte_level_tokenizer(judge, tmp_path, adds_bos):
    tokenizer = AutoTokenizer.from_pretrained(models.save_byte_level_tokenizer(tmp_path, adds_bos=adds_bos))
    check(judge, tokenizer, tmp_path)


@pytest.mark.parametrize("adds_space", [False, True])
def test_a_sentencepiece_tokenizer(judge, tmp_path, adds_space):
    tokenizer = AutoTokenizer.from_pretrained(models.save_sentencepiece_tokenizer(tmp_path, adds_space=adds_space))
    check(judge, tokenizer, tmp_path)


def chat_ids(loaded) -> list[int]:
    """What llama.cpp feeds its model for a chat: it takes away a template's BOS where the tokenizer adds one."""
    return loaded.tokenize(loaded.apply_template(CHAT), special=True)


def check(judge, tokenizer, folder: Path) -> None:
    with judge.loaded(write_model(folder, folder / "a.gguf", models.VOCAB_SIZE), models.VOCAB_SIZE) as loaded:
        for text in TEXTS:
            assert loaded.tokenize(text) == tokenizer.encode(text, add_special_tokens=False), text
            assert loaded.tokenize(text, special=True) == tokenizer.encode(text), text
        ids = chat_ids(loaded)
        if tokenizer.bos_token_id in tokenizer.encode(""):  # llama.cpp puts a BOS before a template that has none
            assert ids.pop(0) == tokenizer.bos_token_id
        assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]


def metadata_of(folder: Path, num_rows: int = models.VOCAB_SIZE, **options):
    return vocabulary_metadata(SavedTokenizer.read(folder), num_rows, **options)


def test_rows_without_a_token_are_unused_ones(tmp_path):
    metadata = metadata_of(models.save_byte_level_tokenizer(tmp_path), 520)
    assert len(metadata["tokenizer.ggml.tokens"]) == 520
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD519]"
    assert metadata["tokenizer.ggml.token_type"][-1] == 5


def test_special_tokens_and_their_types(tmp_path):
    metadata = metadata_of(models.save_byte_level_tokenizer(tmp_path, adds_bos=True))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[metadata["tokenizer.ggml.bos_token_id"]] == "<|begin|>"
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert tokens[metadata["tokenizer.ggml.padding_token_id"]] == "<|pad|>"
    assert types[tokens.index("<|im_start|>")] == 3
    assert types[tokens.index("<tool>")] == 4
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False


def test_the_template_that_was_trained_with_wins(tmp_path):
    folder = models.save_byte_level_tokenizer(tmp_path)
    assert metadata_of(folder)["tokenizer.chat_template"] == models.CHATML
    assert metadata_of(folder, chat_template="{{ 1 }}")["tokenizer.chat_template"] == "{{ 1 }}"
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in metadata_of(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = metadata_of(folder)
    assert metadata["tokenizer.chat_template"] == "a"
    assert metadata["tokenizer.chat_template.tool_use"] == "b"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


def test_a_splitter_that_llama_cpp_does_not_have_is_refused(tmp_path):
    folder = models.save_byte_level_tokenizer(tmp_path, words=r"\p{L}+|\p{N}{1,4}|.")
    with pytest.raises(TokenizerError, match="no splitter"):
        metadata_of(folder)
