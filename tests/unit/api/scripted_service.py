"""A service that plays scripted outputs, and the app around it with a small tokenizer."""

import asyncio
import json

import httpx
import openai
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from afd_server.api.app import create_app
from afd_server.api.keys import KeyRing
from afd_server.api.settings import ApiSettings
from afd_server.telemetry.metrics import Metrics
from afd_server.text.chat_template import ChatTemplate
from afd_server.text.tokenizer import Tokenizer
from afd_server.types import FinishReason, RequestOutput, TokenLogprobs

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = 256


def byte_tokenizer():
    """One token per byte, and the end token 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, {"eos_token": "<|end|>"})


TOKENIZER = byte_tokenizer()


class ScriptedService:
    """Answers request i with the i-th script: a list of outputs, or an exception to raise, in any mixture."""

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.requests = []
        self.closed = []
        self.problems = []
        self.serving = True

    async def generate(self, request):
        script = self.scripts[len(self.requests) % len(self.scripts)]
        self.requests.append(request)
        try:
            for item in script:
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                else:
                    yield item
        finally:
            self.closed.append(request.request_id)

    def health(self):
        return self.problems

    def is_serving(self):
        return self.serving


def says(text, finish=FinishReason.STOP, *, step=1, cached_tokens=0, logprob=None):
    """The outputs of a request that generates `text`, `step` tokens at a time, then the end token for STOP."""
    ids = TOKENIZER.encode(text) + ([EOS] if finish is FinishReason.STOP else [])
    parts = [tuple(ids[i : i + step]) for i in range(0, len(ids), step)]
    outputs = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        logprobs = (
            (TokenLogprobs(logprob, ((part[0], logprob), (3, -9.0))),) * len(part)
            if logprob is not None
            else ()
        )
        outputs.append(
            RequestOutput(
                "",
                part,
                logprobs,
                finish if is_last else None,
                EOS if is_last and finish is FinishReason.STOP else None,
                cached_tokens if number == 0 else 0,
            )
        )
    return outputs


def app_for(service, traces=None, **settings):
    values = {"model_name": "tiny", "max_model_len": 64, "vocab_size": 257, "version": "9", "created": 7}
    values |= {"chat_template": ChatTemplate(TEMPLATE), **settings}
    if "api_key" in values:
        values["keys"] = KeyRing(values.pop("api_key"))
    return create_app(ApiSettings(**values), service, TOKENIZER, Metrics("tiny"), traces)


def client_for(service, traces=None, **settings):
    transport = httpx.ASGITransport(app_for(service, traces, **settings), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def openai_client(service, **settings):
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="k", max_retries=0, http_client=client_for(service, **settings)
    )


async def post(service, path="/v1/completions", settings=None, **body):
    async with client_for(service, **(settings or {})) as client:
        return await client.post(path, json=body)


def events(response):
    """The JSON of every event; the stream must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
