"""A chat, whole and streamed, with OpenAI's Python client.

Any client for OpenAI's API does: it is told where the server is, and any key unless the server was started with one.
"""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("AFD_API_KEY", "none"),
)
model = client.models.list().data[0].id
question = {"role": "user", "content": "What is the capital of France? Answer in one short sentence."}

answer = client.chat.completions.create(model=model, messages=[question], temperature=0)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens, "tokens in,", answer.usage.completion_tokens, "tokens out")

follow_up = [
    question,
    {"role": "assistant", "content": answer.choices[0].message.content},
    {"role": "user", "content": "Name one river that flows through it."},
]
for chunk in client.chat.completions.create(model=model, messages=follow_up, max_tokens=40, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
