"""Between text and token ids: the tokenizer, the chat template, and text that grows token by token.

What lives here knows strings and ids only: no HTTP, no sampling, no tensors. Called by api/ and llm.
"""
