"""OpenAI's Python client: chat, completions, responses, structured outputs, tools, errors."""

import json

import openai
from checks import API_KEY, MODEL, QUESTION, URL, WEATHER, check
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather", "parameters": WEATHER},
}


class City(BaseModel):
    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)


@check("chat")
def chat():
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0, logprobs=True
    )
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
    assert "Paris" in answer.choices[0].message.content
    return answer.choices[0].message.content


@check("chat stream with usage")
def chat_stream():
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens > 0
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@check("completions, a batch of token ids")
def completions():
    answer = client.completions.create(
        model=MODEL, prompt=[[1, 2, 3], [4, 5]], max_tokens=4, echo=True, logprobs=1
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    return [choice.finish_reason for choice in answer.choices]


@check("parsed answer (json_schema)")
def parsed():
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Paris"}], response_format=City, max_tokens=100
    )
    return answer.choices[0].message.parsed


@check("tool call, required")
def tool_call():
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=200
    )
    call = answer.choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    return f"{call.function.name}({call.function.arguments})"


@check("tool call, streamed by the client's own helper")
def tool_stream():
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=200
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert call.id
    return f"{call.function.name}({call.function.arguments})"


@check("responses")
def responses():
    answer = client.responses.create(
        model=MODEL, input=QUESTION, instructions="Be short.", max_output_tokens=24, temperature=0
    )
    assert answer.status in ("completed", "incomplete")
    return answer.output_text


@check("responses stream")
def responses_stream():
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=24, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    return text


@check("responses with a tool")
def responses_tool():
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}
    answer = client.responses.create(
        model=MODEL, input=QUESTION, tools=[tool], tool_choice="required", max_output_tokens=200
    )
    call = next(item for item in answer.output if item.type == "function_call")
    return f"{call.name}({call.arguments})"


@check("errors are typed")
def errors():
    for bad in ({"model": "no-such-model"}, {"temperature": -1}, {"max_tokens": 10**9}):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **bad})
        except (openai.NotFoundError, openai.BadRequestError) as error:
            if not (error.body["message"] and error.body["type"]):
                raise AssertionError(error.body) from error
        else:
            raise AssertionError(bad)
    return "NotFoundError, BadRequestError, BadRequestError"


@check("models")
def models():
    assert client.models.retrieve(MODEL).id == MODEL
    return [model.id for model in client.models.list()]
