"""A constraint that binds the answer and leaves the reasoning before it free.

What lives here: the grammar around a constraint, in llguidance's form. What does not: the constraint itself
(constraints.py), and the marks (reasoning.py).
"""

from __future__ import annotations

import json

from afd_server.text.message_parser import MessageFormat
from afd_server.text.tokenizer import Tokenizer


def after_reasoning(constraint: str, form: MessageFormat, tokenizer: Tokenizer) -> str:
    """The constraint as it is for a model that does not reason, or whose prompt has closed its reasoning already.

    A model that has not opened its reasoning yet may go without.
    """
    reasoning = form.reasoning
    if reasoning is None or form.prompt_tail.rstrip().endswith(reasoning.closing):
        return constraint
    opening, closing = reasoning.marks
    special = {mark: min(ids) for mark in reasoning.marks if (ids := tokenizer.special_ids([mark]))}
    opened = f"<[{special[opening]}]>" if opening in special else json.dumps(opening)
    grammar = [
        f"start: {'thought' if form.begins_inside else f'({opened} thought)?'} /[ \\n]{{0,4}}/ answer",
        "answer: @answer",
        *(
            [f"thought: TEXT <[{special[closing]}]>", "TEXT: /(.|\\n)*/"]
            if closing in special
            else [f"thought[suffix={json.dumps(closing)}]: /(.|\\n)*/"]
        ),
    ]
    first, *others = _grammars(constraint)
    first = {**first, "name": "answer"}
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(grammar)}, first, *others]})


def _grammars(constraint: str) -> list[dict[str, object]]:
    """llguidance takes a list of grammars, of which the first counts, or one in Lark's notation."""
    try:
        grammars: list[dict[str, object]] = json.loads(constraint)["grammars"]
    except ValueError:
        return [{"lark_grammar": constraint}]
    return grammars
