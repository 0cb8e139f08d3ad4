"""Between text and token ids: the tokenizer, the chat template, text that grows token by token, what it means (reasoning, tool
calls), and the grammars that bind it.

What lives here knows strings and ids only: no HTTP, no sampling, no tensors. Called by api/ and llm.
"""
