"""Output of a given form: JSON by a schema, one of several words.

`response_format` is OpenAI's, `structured_outputs` vLLM's; [Structured outputs](structured-outputs.md) has both in full. What
comes out is valid whatever the model; whether it is true is the model's affair.
"""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("AFD_API_KEY", "none"),
)
model = client.models.list().data[0].id

city = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "country": {"type": "string", "maxLength": 40},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "country", "is_capital"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Describe Paris as JSON."}],
    temperature=0,
    max_tokens=100,
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": city}},
)
print(json.loads(answer.choices[0].message.content))

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Is 'I love this film' positive or negative?"}],
    temperature=0,
    extra_body={"structured_outputs": {"choice": ["positive", "negative"]}},
)
print(answer.choices[0].message.content)
