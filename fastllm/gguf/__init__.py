"""GGUF files, llama.cpp's format: written from checkpoint tensors without a compiler, a network or llama.cpp itself.

export.py         the plan of a file and the stream of tensors into it
lora.py           an adapter as a file of its own
architectures/    configurations and tensor names of each model family
vocabulary.py     tokenizers
recipes.py        which tensor gets which type
quantizers/       weights to bytes and back, one class a type
container.py      the format; reader.py and writer.py, files of it
"""

from .export import ExportPlan, export_gguf, export_plan
from .lora import write_lora_gguf
from .reader import GGUFReader
from .recipes import ExplicitRecipe, Recipe, static_mix

__all__ = [
    "ExplicitRecipe",
    "ExportPlan",
    "GGUFReader",
    "Recipe",
    "export_gguf",
    "export_plan",
    "static_mix",
    "write_lora_gguf",
]
