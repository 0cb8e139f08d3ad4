"""An executor for tests: it keeps token ids where the real one keeps keys and values, so wrong blocks show in its tokens."""

from afd_server.config import ServeConfig
from afd_server.errors import WorkerError
from afd_server.types import PromptLogprobs, SampledToken, StepOutput, StepTiming, TokenLogprobs

VOCAB_SIZE = 40
EOS = 0
GARBAGE = -1


def next_token(token_ids):
    """The next token after these: any function of all of them, and of their order."""
    value = len(token_ids)
    for token_id in token_ids:
        value = (value * 31 + token_id + 1) % 10007
    return value % VOCAB_SIZE


def continuation(prompt, sampling, max_model_len):
    """What a request gives when it runs alone, by the rules of its end."""
    tokens = []
    if sampling.max_tokens == 0:
        return tokens, "length"
    while True:
        tokens.append(next_token([*prompt, *tokens]))
        ends = tokens[-1] in sampling.stop_token_ids or (tokens[-1] == EOS and not sampling.ignore_eos)
        if ends and len(tokens) > sampling.min_tokens:
            return tokens, "stop"
        if len(tokens) == sampling.max_tokens or len(prompt) + len(tokens) == max_model_len:
            return tokens, "length"


def report_on(prompt):
    """What is reported of a prompt: any function of each token and of all before it."""
    return [TokenLogprobs(-float(next_token(prompt[:place]))) for place in range(2, len(prompt) + 1)]


class ToyWorker:
    """Carries plans out and checks each against the contract of StepPlan. failing_steps: those that end in an error."""

    def __init__(self, config, failing_steps=(), error=None):
        self.config = config
        self.failing_steps = set(failing_steps)
        self.error = error or WorkerError("ffn-0", "broken", layer=1)
        self.cache = {}
        self.num_output = {}
        self.plans = []

    def execute(self, plan):
        self.plans.append(plan)
        for request_id in plan.finished:
            self.num_output.pop(request_id, None)
        for request in plan.started:
            assert request.request_id not in self.num_output, "started twice"
            self.num_output[request.request_id] = len(request.output_token_ids)
        requests = [request for batch in plan.micro_batches for request in batch]
        self._check(plan, requests)
        fails = plan.step in self.failing_steps
        for request in requests:
            self._write(request, GARBAGE if fails else None)
        if fails:
            raise self.error
        tokens = [SampledToken(each.request_id, self._sample(each)) for each in requests if each.samples]
        reports = [PromptLogprobs(each.request_id, self._report(each)) for each in requests if each.report]
        timing = StepTiming(1.0, num_tokens=plan.num_tokens, num_micro_batches=len(plan.micro_batches))
        return StepOutput(plan.step, tuple(tokens), timing, tuple(reports))

    def _check(self, plan, requests):
        assert all(plan.micro_batches), "an empty micro-batch"
        assert len({request.request_id for request in requests}) == len(requests), (
            "a request in two micro-batches"
        )
        assert {request.request_id for request in requests} <= self.num_output.keys(), "not started"
        assert len(self.num_output) <= self.config.max_num_seqs + len(plan.finished)
        assert len(requests) <= self.config.max_num_seqs
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        written = [slot for request in requests for slot in self._slots(request, request.start_position)]
        assert len(set(written)) == len(written), "two requests write into one slot"

    def _slots(self, request, start):
        size = self.config.block_size
        return [
            (request.block_table[position // size], position % size)
            for position in range(start, request.start_position + len(request.token_ids))
        ]

    def _write(self, request, instead):
        for slot, token_id in zip(self._slots(request, request.start_position), request.token_ids, strict=True):
            self.cache[slot] = token_id if instead is None else instead

    def _report(self, request):
        known = [self.cache[slot] for slot in self._slots(request, 0)]
        entries = []
        for place, token_id in enumerate(
            request.report.token_ids, request.start_position + request.report.first
        ):
            assert place < len(known), "a report on a token that the step has not come to"
            entries.append(report_on([*known[: place + 1], token_id])[-1])
        return tuple(entries)

    def _sample(self, request):
        self.num_output[request.request_id] += 1
        return next_token([self.cache[slot] for slot in self._slots(request, 0)])


def small_config(**settings):
    return ServeConfig(
        **{"max_model_len": 32, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, **settings}
    )
