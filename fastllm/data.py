"""Data sets: loading in any format, tokenising with response masks, looking at the result.

from fastllm.data import load_chat_data, tokenize_chats, preview
"""

from .text.encoding import RowEncoder
from .text.formats import FORMATS, canonical, detect_format, messages_of
from .text.loading import load_chat_data
from .text.preview import Preview, preview
from .text.response_spans import ResponseFinder
from .text.token_policy import TokenPolicy, token_policy
from .text.tokenize_chats import DataReport, tokenize_chats

__all__ = [
    "FORMATS",
    "DataReport",
    "Preview",
    "ResponseFinder",
    "RowEncoder",
    "TokenPolicy",
    "canonical",
    "detect_format",
    "load_chat_data",
    "messages_of",
    "preview",
    "token_policy",
    "tokenize_chats",
]
