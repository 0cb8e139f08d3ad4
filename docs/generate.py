"""Writes what the pages of docs/ say of the code: tables of models and flags, and the example programs.

    .venv/bin/python -m docs.generate           # after a change of a flag, a family or an example

Each goes between two comments of its page, `<!-- generated: NAME -->` and `<!-- end -->`, and is committed with it, since
pages are read on code hosts too; a test says when one is out of date. What does not live here: the sentences around them.
"""

import ast
import contextlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from afd_server import cli
from afd_server.command_line import Parser
from afd_server.models.config_file import ConfigFile
from afd_server.models.families import FAMILIES, STEP3_VISION
from afd_server.models.spec import AttentionSpec, DenseSpec, GQASpec, MLASpec, ModelSpec, MoESpec
from docs import api_tables

DOCS = Path(__file__).parent
EXAMPLES = DOCS / "examples"
PAGES = ("models", "flags", "examples", "api")
PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.S)


def main() -> None:
    for page in PAGES:
        path = DOCS / f"{page}.md"
        path.write_text(brought_up_to_date(path.read_text(encoding="utf-8")), encoding="utf-8")


def brought_up_to_date(markdown: str) -> str:
    """The page with each of its generated parts made anew."""
    return PART.sub(lambda found: f"{found[1]}\n{part(found[2])}\n{found[3]}", markdown)


# --- models --------------------------------------------------------------------------------------------------------

# One configuration that has every key which a family requires, with values that tell what the family makes of them.
SAMPLE = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "num_hidden_layers": 4, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "share_q_dim": 24, "moe_num_experts": 8, "moe_top_k": 2, "share_expert_dim": 32,
}  # fmt: skip


def models_table() -> str:
    rows = []
    for name, family in FAMILIES.items():
        spec = family.read(ConfigFile({"architectures": [name], "text_config": SAMPLE, **SAMPLE}, name))
        left_out = ["the layers that predict several tokens at once"] if family.prediction_layers else []
        left_out += ["images"] if STEP3_VISION in family.ignored else []
        rows.append(
            (
                f"`{name}`",
                attention_of(spec.attention),
                ffn_of(spec),
                cache_of(spec.attention),
                ", ".join(left_out),
            )
        )
    return table(
        ("`architectures`", "attention", "FFN", "values cached per token and layer", "not served"), rows
    )


def attention_of(attention: AttentionSpec) -> str:
    if isinstance(attention, MLASpec):
        return "multi-head latent (MLA)"
    if not isinstance(attention, GQASpec):
        return "multi-matrix factorization (MFA)"
    extras = [
        words
        for words, has in (("biases on Q, K, V", attention.qkv_bias), ("norms on Q, K", attention.qk_norm))
        if has
    ]
    return ", ".join(["grouped-query (GQA)", *extras])


def ffn_of(spec: ModelSpec) -> str:
    experts = next((ffn for ffn in spec.ffn if isinstance(ffn, MoESpec)), None)
    if experts is None:
        return "MLP"
    kinds = [f"experts by {experts.scoring}"]
    kinds += ["in groups"] if experts.num_groups > 1 else []
    kinds += ["a shared one"] if experts.shared_intermediate_size else []
    kinds += ["MLP in some layers"] if any(isinstance(ffn, DenseSpec) for ffn in spec.ffn) else []
    return ", ".join(kinds)


def cache_of(attention: AttentionSpec) -> str:
    if isinstance(attention, MLASpec):
        return "latent rank + RoPE dimensions"
    return "2 × KV heads × head size" if isinstance(attention, GQASpec) else "2 × head size"


# --- flags ---------------------------------------------------------------------------------------------------------


class _Help(Exception):  # noqa: N818  no error: how the parser of a command is had
    def __init__(self, parser: Parser) -> None:
        self.parser = parser


def _stop(parser: Parser, file: object = None) -> None:
    raise _Help(parser)


def parsers(command: tuple[str, ...] = (), above: str = "") -> Iterator[Parser]:
    """The parser of each command that has flags, as `afd COMMAND --help` would print it.

    above: the program that `command` was found in. The choices of an argument that are no commands lead back to it.
    """
    with mock.patch.object(Parser, "print_help", _stop), contextlib.suppress(SystemExit):
        try:
            cli.main([*command, "--help"])
        except _Help as stopped:
            parser = stopped.parser
    below = [action.choices for action in parser._actions if not action.option_strings and action.choices]
    if not below or parser.prog == above:
        yield parser
        return
    known = list(cli.COMMANDS)  # in the order of `afd --help`
    for name in sorted(below[0], key=lambda name: known.index(name) if name in known else 0):
        yield from parsers((*command, str(name)), parser.prog)


def flags_sections() -> str:
    return "\n".join("\n".join(_command(parser)) for parser in parsers())


def _command(parser: Parser) -> Iterator[str]:
    yield f"## {parser.prog}\n"
    yield _escaped(parser.description or "").replace("\n", " ") + "\n"
    plain = []
    for group in parser._action_groups:
        rows = [
            _flag(parser, action) for action in group._group_actions if "--help" not in action.option_strings
        ]
        if group.title in ("positional arguments", "options"):
            plain += rows
            continue
        if plain:
            yield _flags_table(plain)
            plain = []
        yield f"### {group.title}{f': {group.description}' if group.description else ''}\n"
        yield _flags_table(rows)
    if plain:
        yield _flags_table(plain)


def _flags_table(rows: list[tuple[str, str, str]]) -> str:
    return table(("flag", "what it says", "default"), rows)


def _flag(parser: Parser, action) -> tuple[str, str, str]:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    text, _, default = re.sub(r"(?:^|[.;] )[Dd]efault: ", "\0", text).partition("\0")
    values = ", ".join(map(str, action.choices)) if action.choices else action.metavar or ""
    if action.nargs != 0 and not values:
        values = action.dest.upper() if action.option_strings else action.dest
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    shown = f"{names} {_escaped(values)}".strip() if names else f"`{values}`"
    return shown, _escaped(text), _escaped(default)


# --- examples ------------------------------------------------------------------------------------------------------


def example(name: str) -> str:
    """A program below its own first words, of which the first line is the heading."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").rstrip()
    if name.endswith(".py"):
        about = ast.get_docstring(ast.parse(text)) or ""
        code, language = text.split('"""', 2)[2].strip(), "python"
    else:
        lines = text.splitlines()[1:]  # without the one that names the shell
        head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        about = "\n".join(line.removeprefix("#").strip() for line in head)
        code, language = "\n".join(lines[len(head) :]).strip(), "bash"
    title, _, rest = about.partition("\n")
    link = f"[`{name}`](examples/{name})"
    return f"## {title.rstrip('.')}\n\n{rest.strip()}\n\n{link}\n\n```{language}\n{code}\n```\n"


# --- Markdown ------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Without the columns that are empty in every row."""
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    lines = [[cells[index] for index in kept] for cells in (head, tuple("---" for _ in head), *rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _escaped(text: str) -> str:
    return re.sub(r"[<|*]", lambda character: {"<": "&lt;"}.get(character[0], f"\\{character[0]}"), text)


# --- the HTTP API --------------------------------------------------------------------------------------------------


def api_routes() -> str:
    return table(("route", "what", "statuses"), api_tables.routes())


def api_fields(body: str) -> str:
    return table(("field", "state", "default", "what it means"), api_tables.fields(body))


PARTS = {
    "models": models_table,
    "flags": flags_sections,
    "example": example,
    "routes": api_routes,
    "fields": api_fields,
}


def part(name: str) -> str:
    kind, _, argument = name.partition(":")
    return PARTS[kind](*[argument] if argument else [])


if __name__ == "__main__":
    main()
