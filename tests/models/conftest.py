"""A checkpoint folder with a tokenizer, as a user has one."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastllm.models import memory

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(**special):
    specials = ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the quick brown fox jumps over the lazy dog and asks why"] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{name: token for name, token in names.items() if token is not None}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def make_checkpoint(folder, *, config_class=LlamaConfig, model_class=LlamaForCausalLM, tokenizer=None, **config):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
        "eos_token_id": 5, "pad_token_id": 3, **config,
    }  # fmt: skip
    model_class(config_class(**settings)).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "tied", tie_word_embeddings=True)


@pytest.fixture
def messages(capsys):
    """What fastllm has told since the last call."""
    from fastllm._notices import forget_notices

    forget_notices()
    return lambda: capsys.readouterr().out


@pytest.fixture
def full_host(monkeypatch):
    """A GPU and its host as the planner sees them: no room for more than inputs on the host."""
    for name, rate in {"product_rate": 1e14, "host_link_rate": 1e10}.items():
        monkeypatch.setattr(memory, name, lambda device, rate=rate: rate)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 0)
