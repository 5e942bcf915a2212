"""Text and data sets: chat templates, formats, response masks, previews. No torch model code.

Users reach everything here through `fastllm.chat_templates` and `fastllm.data`.
"""
