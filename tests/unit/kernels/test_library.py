"""Compiling the kernels: once, for this CPU, and with a clear word where it cannot be done."""

import pytest

from afd_server.kernels import library as module
from afd_server.kernels.library import KernelBuildError, best_instruction_set, build, usable_instruction_sets


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("AFD_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def broken_source(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return missing; }")
    return source


def compiler_that_counts(directory):
    """A compiler that notes each compilation; gives its path and the notes."""
    notes, script = directory / "notes", directory / "counting-c++"
    script.write_text(f'#!/bin/sh\ncase "$1" in --version) ;; *) echo once >> {notes} ;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return script, notes


def test_it_is_compiled_once(home, monkeypatch, tmp_path):
    compiler, notes = compiler_that_counts(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    first = build("portable")
    assert first.parent == home / "kernels" and build("portable") == first
    assert notes.read_text().split() == ["once"]
    assert [file.name for file in first.parent.iterdir()] == [first.name]


def test_without_a_compiler_it_says_what_to_install(home, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelBuildError, match="apt install g"):
        build("portable")


def test_what_the_compiler_says_is_passed_on(home, broken_source):
    with pytest.raises(KernelBuildError, match="missing"):
        build("portable", broken_source)
    assert list((home / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AFD_HOME", str(tmp_path / "file"))
    with pytest.raises(KernelBuildError, match=str(tmp_path / "file")):
        build("portable")


@pytest.mark.parametrize(
    ("flags", "best", "usable"),
    [
        (
            "sse2 avx2 fma avx512f avx512bw avx512vl avx512dq avx512_vnni",
            "avx512",
            ["avx512", "avx2", "portable"],
        ),
        ("sse2 avx2 fma avx512f", "avx2", ["avx2", "portable"]),
        ("sse2", "portable", ["portable"]),
    ],
)
def test_the_instruction_set_is_the_best_that_the_cpu_has(monkeypatch, flags, best, usable):
    monkeypatch.setattr(module, "_cpu_flags", lambda: frozenset(flags.split()))
    assert best_instruction_set() == best
    assert usable_instruction_sets() == usable
