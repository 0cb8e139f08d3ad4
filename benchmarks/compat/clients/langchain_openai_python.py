"""langchain-openai's ChatOpenAI."""

from checks import API_KEY, MODEL, QUESTION, URL, check
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(
    model=MODEL, base_url=f"{URL}/v1", api_key=API_KEY, max_retries=0, max_tokens=200, temperature=0
)


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)


@check("invoke")
def invoke():
    answer = model.invoke(QUESTION, max_tokens=24)
    assert answer.usage_metadata["output_tokens"] > 0
    return answer.content


@check("stream")
def stream():
    return "".join(chunk.content for chunk in model.stream(QUESTION, max_tokens=24))


@check("batch")
def batch():
    return [answer.content for answer in model.batch([QUESTION] * 3, max_tokens=8)]


@check("bind_tools")
def bind_tools():
    call = model.bind_tools([GetWeather], tool_choice="required").invoke(QUESTION).tool_calls[0]
    return f"{call['name']}({call['args']})"


@check("with_structured_output (json_schema)")
def structured():
    return model.with_structured_output(GetWeather, method="json_schema").invoke("Paris")
