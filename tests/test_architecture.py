"""The house rules, executable: what may import what, how large things may grow, what they may be called.

Read from the source by `ast`; nothing is imported. A rule that is in the way is changed here, with its reason.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "afd_server"

# Imports go down only. Rooms of one level may use each other except where the level is marked apart.
LEVELS = {
    7: {"cli", "llm", "chat", "admin", "serving", "profiling", "watching", "__main__"},
    6: {"api", "cluster", "simulator"},
    5: {"router"},
    4: {"engine", "attention", "ffn"},
    3: {"kvcache", "transport", "planner", "text", "checkpoints", "bench"},
    2: {"models"},
    1: {"kernels", "pipeline", "telemetry", "traffic"},
    0: {"types", "config", "errors", "command_line", "__init__"},
}
APART = {6, 4}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}

# Who alone may import what: library (or a name in it) -> rooms, or single modules.
RESERVED = {
    "ray": {"cluster"},
    # api.server takes the port before anything else is started; serving holds it until the front-end opens.
    "socket": {"transport", "api.server", "serving"},
    "socketserver": {"transport"},
    "selectors": {"transport"},
    "select": {"transport"},
    "zmq": {"transport"},
    "torch.distributed": {"transport"},
    "multiprocessing.connection": {"transport"},
    "multiprocessing.shared_memory": {"transport"},
    "fastapi": {"api"},
    "aiohttp": {"bench.client"},
    "uvicorn": {"api"},
    "prometheus_client": {"api", "telemetry", "watching.samples"},
    "opentelemetry": {"telemetry"},
    # Bytes from elsewhere never become objects of any type.
    "pickle": set(),
    "cPickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "marshal": set(),
    "shelve": set(),
}
STREAMS = {
    "open_connection",
    "start_server",
    "open_unix_connection",
    "start_unix_server",
    "StreamReader",
    "StreamWriter",
}

# Decisions: their tests run in milliseconds. A folder stands for every module in it.
TORCH_FREE = (
    "types", "config", "errors", "pipeline", "traffic", "engine.scheduler", "engine.micro_batches", "engine.step_time", "engine.pace", "kvcache.block_pool", "router",
    "models.spec", "models.families", "attention.preference", "ffn.merging", "planner", "bench", "simulator",
)  # fmt: skip

FILE_LINES, FUNCTION_LINES, CLASS_LINES = 400, 60, 300
# What is larger, and how large it may be. This list may only shrink: an entry that is no longer needed fails.
LARGER: dict[str, int] = {}

GRAB_BAGS = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common|tools)$")


@dataclass(frozen=True)
class Import:
    """One imported name, dotted. runs: it is executed when the module is imported (not lazy, not for types only)."""

    name: str
    line: int
    runs: bool


def module_paths():
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(path):
    """Dotted, below the package: 'engine.scheduler', 'engine' for a room's __init__, '__init__' for the package's."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {module_name(path): path for path in module_paths()}


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module):
    found = []
    _collect(tree_of(module), True, found)
    return tuple(found)


def _collect(node, runs, found):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found.extend(Import(alias.name, child.lineno, runs) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            found.extend(Import(f"{child.module}.{alias.name}", child.lineno, runs) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            _collect(child, False, found)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for statement in child.body:
                _collect(ast.Module([statement], []), False, found)
            for statement in child.orelse:
                _collect(ast.Module([statement], []), runs, found)
        else:
            _collect(child, runs, found)


def own_module(name):
    """The module of this package that an imported name is or lies in, or None."""
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        return None
    inner = name.removeprefix(PACKAGE).removeprefix(".")
    while inner and inner not in MODULES:
        inner = inner.rpartition(".")[0]
    return inner or "__init__"


def room_of(module):
    return module.split(".")[0]


def is_within(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_the_rules_name_modules_that_exist():
    named = {*TORCH_FREE, *(user for users in RESERVED.values() for user in users)}
    assert sorted(named - set(MODULES)) == []


def test_every_module_belongs_to_a_level():
    assert {room_of(module) for module in MODULES} <= set(LEVEL_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    room = room_of(module)
    for imported in imports_of(module):
        target = own_module(imported.name)
        if target is None or room_of(target) == room:
            continue
        theirs, ours = LEVEL_OF[room_of(target)], LEVEL_OF[room]
        where = f"{module}:{imported.line} imports {imported.name}"
        assert theirs <= ours, f"{where}, which is on level {theirs}, above its own {ours}"
        assert theirs < ours or ours not in APART, f"{where}: rooms of level {ours} do not know each other"


@pytest.mark.parametrize("module", MODULES)
def test_libraries_stay_in_their_rooms(module):
    for imported in imports_of(module):
        for library, users in RESERVED.items():
            if is_within(imported.name, library):
                allowed = any(is_within(module, user) for user in users)
                assert allowed, f"{module}:{imported.line} imports {imported.name}; only {sorted(users)} may"


@pytest.mark.parametrize("module", MODULES)
def test_streams_of_asyncio_stay_in_transport(module):
    if room_of(module) == "transport":
        return
    for node in ast.walk(tree_of(module)):
        used = isinstance(node, ast.Attribute) and node.attr in STREAMS
        assert not used, f"{module}:{getattr(node, 'lineno', 0)} opens a connection of its own"
    names = {imported.name for imported in imports_of(module)}
    assert not {f"asyncio.{name}" for name in STREAMS} & names


@pytest.mark.parametrize("module", [m for m in MODULES if any(is_within(m, free) for free in TORCH_FREE)])
def test_decisions_import_no_torch(module):
    """Neither on their own account, nor through anything of this package that is imported with them."""
    own = [imported.name for imported in imports_of(module)]
    assert not [name for name in own if is_within(name, "torch")], f"{module} imports torch"
    seen, waiting = set(), [(module, module)]
    while waiting:
        current, path = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for imported in imports_of(current):
            if not imported.runs:
                continue
            assert not is_within(imported.name, "torch"), f"{path} imports torch"
            target = own_module(imported.name)
            if target:
                parts = target.split(".")
                packages = [".".join(parts[:n]) for n in range(1, len(parts))]  # their __init__ runs first
                waiting.extend((name, f"{path} -> {name}") for name in [*packages, target])


def sizes():
    """(what, lines, limit) of every file, class and function; a nested function counts as part of its outer one too."""
    for module, path in MODULES.items():
        yield path.relative_to(ROOT).as_posix(), len(path.read_text().splitlines()), FILE_LINES
        yield from _sizes_within(tree_of(module), module)


def _sizes_within(node, name):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            limit = CLASS_LINES if isinstance(child, ast.ClassDef) else FUNCTION_LINES
            yield f"{name}.{child.name}", child.end_lineno - child.lineno + 1, limit
            yield from _sizes_within(child, f"{name}.{child.name}")
        else:
            yield from _sizes_within(child, name)


def test_nothing_grows_beyond_its_limit():
    too_large = {what: lines for what, lines, limit in sizes() if lines > LARGER.get(what, limit)}
    assert not too_large


def test_the_list_of_larger_things_only_shrinks():
    still_larger = {what for what, lines, limit in sizes() if lines > limit}
    assert set(LARGER) <= still_larger, "take the others off the list"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree_of(module)), f"{MODULES[module]} has no docstring"


@pytest.mark.parametrize(
    "module", [m for m, path in MODULES.items() if path.name == "__init__.py" and m != "__init__"]
)
def test_a_room_opens_with_an_introduction_and_nothing_else(module):
    assert len(tree_of(module).body) == 1


def test_modules_are_called_after_what_they_hold():
    grab_bags = [module for module in MODULES if GRAB_BAGS.search(module.rpartition(".")[2])]
    assert not grab_bags
