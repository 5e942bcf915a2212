"""GGUF files, llama.cpp's format: written from checkpoint tensors without a compiler, a network or llama.cpp itself.

plan.py           what a file will hold, before any weight is read
export.py         the stream of tensors into it
lora.py           an adapter as a file of its own
architectures/    configurations and tensor names of each model family
vocabulary.py     tokenizers
recipes.py        which tensor gets which type
quantizers/       weights to bytes and back, one class a type
container.py      the format; reader.py and writer.py, files of it
"""

from .export import export_gguf
from .lora import write_lora_gguf
from .plan import MMPROJ_TYPES, ExportPlan, export_plan, mmproj_plan
from .reader import GGUFReader
from .recipes import ExplicitRecipe, Recipe, static_mix

__all__ = [
    "MMPROJ_TYPES",
    "ExplicitRecipe",
    "ExportPlan",
    "GGUFReader",
    "Recipe",
    "export_gguf",
    "export_plan",
    "mmproj_plan",
    "static_mix",
    "write_lora_gguf",
]
