"""Chat templates and conversations: the drop-in names, and what goes beyond them.

from fastllm.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
"""

from .text.ollama import modelfile, modelfile_of
from .text.plain_template import apply_chat_template, construct_chat_template, get_ollama_eos_tokens
from .text.rendering import ChatRenderer
from .text.responses import train_on_responses_only
from .text.sandbox import TemplateError
from .text.self_checks import test_chat_templates, test_construct_chat_template, test_hf_gguf_equivalence
from .text.sharegpt import (
    chatml_to_sharegpt,
    sharegpt_to_chatml,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from .text.stopping import create_stopping_criteria, remove_special_tokens
from .text.templates import CHAT_TEMPLATES, DEFAULT_SYSTEM_MESSAGE, OLLAMA_TEMPLATES
from .text.tokenizer_setup import get_chat_template

__all__ = [
    "CHAT_TEMPLATES",
    "DEFAULT_SYSTEM_MESSAGE",
    "OLLAMA_TEMPLATES",
    "ChatRenderer",
    "TemplateError",
    "apply_chat_template",
    "chatml_to_sharegpt",
    "construct_chat_template",
    "create_stopping_criteria",
    "get_chat_template",
    "get_ollama_eos_tokens",
    "modelfile",
    "modelfile_of",
    "remove_special_tokens",
    "sharegpt_to_chatml",
    "standardize_data_formats",
    "standardize_sharegpt",
    "test_chat_templates",
    "test_construct_chat_template",
    "test_hf_gguf_equivalence",
    "to_sharegpt",
    "train_on_responses_only",
]
