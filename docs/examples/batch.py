"""Many prompts in one request, with the probability of each token.

The prompts run as one batch, several choices (`n`) of each beside one another. With a `seed` the same choices come again,
whatever else the server does meanwhile.
"""

import math
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("AFD_API_KEY", "none"),
)
model = client.models.list().data[0].id
prompts = ["The capital of France is", "Water freezes at", "The opposite of hot is"]

answer = client.completions.create(
    model=model, prompt=prompts, n=2, seed=7, temperature=0.8, max_tokens=6, logprobs=1
)
for choice in answer.choices:  # n for the first prompt, n for the second, and so on
    mean_logprob = sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
    print(f"{math.exp(mean_logprob):.2f} a token: {prompts[choice.index // 2]}{choice.text!r}")
