"""litellm, as it calls any server of OpenAI's form."""

import json

import litellm
from checks import API_KEY, MODEL, QUESTION, URL, WEATHER, check

CALL = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": API_KEY, "num_retries": 0}
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}


@check("completion")
def completion():
    return (
        litellm.completion(**CALL, messages=MESSAGES, max_tokens=24, temperature=0).choices[0].message.content
    )


@check("stream")
def stream():
    chunks = litellm.completion(**CALL, messages=MESSAGES, max_tokens=24, temperature=0, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@check("tool call, required")
def tool_call():
    answer = litellm.completion(**CALL, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=200)
    call = answer.choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    return call.function.arguments


@check("responses")
def responses():
    return litellm.responses(**CALL, input=QUESTION, max_output_tokens=24).output[0].content[0].text


@check("errors are typed")
def errors():
    try:
        litellm.completion(**CALL, messages=MESSAGES, temperature=-1)
    except litellm.BadRequestError as error:
        return error.message
    raise AssertionError("no error")
