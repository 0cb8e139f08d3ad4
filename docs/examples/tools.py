"""A tool that the model must call, and its result sent back.

With `tool_choice="required"` any model's call fits the schema. Models that were trained for it choose by themselves with
"auto"; [Tool calls](tool-calling.md) has their formats.
"""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("AFD_API_KEY", "none"),
)
model = client.models.list().data[0].id

weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
messages = [{"role": "user", "content": "How is the weather in Paris?"}]
answer = client.chat.completions.create(
    model=model, messages=messages, tools=[weather], tool_choice="required", temperature=0, max_tokens=100
)
call = answer.choices[0].message.tool_calls[0]
city = json.loads(call.function.arguments)["city"]
print(call.function.name, city)

messages += [
    answer.choices[0].message,
    {"role": "tool", "tool_call_id": call.id, "content": f"{city}: 21 degrees, sunny"},
]
answer = client.chat.completions.create(
    model=model, messages=messages, tools=[weather], tool_choice="none", temperature=0, max_tokens=40
)
print(answer.choices[0].message.content)
