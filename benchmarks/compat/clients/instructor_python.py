"""instructor, by tools and by JSON schema."""

import instructor
import openai
from checks import API_KEY, MODEL, URL, check
from pydantic import BaseModel, ConfigDict, Field

openai_client = openai.OpenAI(base_url=f"{URL}/v1", api_key=API_KEY, max_retries=0)
MESSAGES = [{"role": "user", "content": "Paris has two million inhabitants."}]


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a small model would go on adding properties

    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)


@check("tools")
def tools():
    client = instructor.from_openai(openai_client, mode=instructor.Mode.TOOLS)
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=City, max_tokens=200, temperature=0, max_retries=0
    )


@check("JSON schema")
def json_schema():
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=City, max_tokens=200, temperature=0, max_retries=0
    )
