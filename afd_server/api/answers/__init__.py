"""OpenAI's JSON, whole and in chunks, with vLLM's additions (stop_reason, token_ids); a file for each route.

What does not live here: when which part is sent (streaming.py). A whole answer is the chunk of one piece that holds
everything, under other names.
"""
