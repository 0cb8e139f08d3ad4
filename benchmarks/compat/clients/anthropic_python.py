"""Anthropic's Python client: messages, their stream, tools, the count of tokens, errors."""

import anthropic
from checks import API_KEY, MODEL, QUESTION, URL, WEATHER, check

client = anthropic.Anthropic(base_url=URL, api_key=API_KEY, max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"name": "get_weather", "description": "The weather", "input_schema": WEATHER}


@check("messages")
def messages():
    answer = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=24, system="Be short.")
    assert answer.usage.input_tokens > 0
    assert answer.stop_reason in ("end_turn", "max_tokens")
    return answer.content[0].text


@check("messages stream")
def stream():
    with client.messages.stream(model=MODEL, messages=MESSAGES, max_tokens=24) as events:
        text = "".join(events.text_stream)
        assert events.get_final_message().content[0].text == text
    return text


@check("tool use")
def tool_use():
    answer = client.messages.create(
        model=MODEL, messages=MESSAGES, max_tokens=200, tools=[TOOL], tool_choice={"type": "any"}
    )
    block = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use"
    assert set(block.input) == {"city", "unit"}
    return f"{block.name}({block.input})"


@check("a tool's result goes back")
def tool_result():
    use = {
        "type": "tool_use",
        "id": "toolu_1",
        "name": "get_weather",
        "input": {"city": "Paris", "unit": "celsius"},
    }
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "21 degrees"}],
    }
    conversation = [*MESSAGES, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    # The default model has not learned to choose tools by itself.
    answer = client.messages.create(
        model=MODEL, messages=conversation, max_tokens=16, tools=[TOOL], tool_choice={"type": "none"}
    )
    return answer.content[0].text


@check("count of tokens")
def count():
    counted = client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens
    usage = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    return counted


@check("errors are typed")
def errors():
    try:
        client.messages.create(model="no-such-model", messages=MESSAGES, max_tokens=1)
    except anthropic.NotFoundError as error:
        return error.body["error"]["type"]
    raise AssertionError("no error")
