"""Faults inside the worker processes of a real server, without a hook for them in the server.

Python imports a module `sitecustomize` at its start wherever it finds one. Here it is found by way of PYTHONPATH, and only
in the worker processes of Ray it replaces a function of the server by a broken one.
"""

import os
import textwrap

HEAD = """
import sys

if any(argument.endswith("default_worker.py") for argument in sys.argv) or "default_worker.py" in " ".join(sys.orig_argv):
    import os, signal
"""


def break_workers(monkeypatch, directory, code):
    """Runs `code` at the start of each worker process of the servers that are started from now on."""
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(HEAD + textwrap.indent(textwrap.dedent(code), "    "))
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
