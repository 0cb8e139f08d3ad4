"""A GGUF file from somewhere else: truncated, or with counts and offsets that lie, it ends in one error that names it."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afd_server.checkpoints.convert import convert
from afd_server.errors import ModelError
from tests.unit.checkpoints.gguf_file import write_gguf


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def refused(tmp_path, content):
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        convert(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 100, 5000, -1, -4000])
def test_a_truncated_file(tmp_path, content, kept):
    refused(tmp_path, content[:kept])


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "keys"])
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40, 10**6])
def test_counts_that_lie(tmp_path, content, place, count):
    refused(tmp_path, content[:place] + struct.pack("<Q", count) + content[place + 8 :])


@pytest.mark.parametrize("length", [2**63, 2**40, 2**31])
def test_the_length_of_a_text_that_lies(tmp_path, content, length):
    """That of the first key."""
    refused(tmp_path, content[:24] + struct.pack("<Q", length) + content[32:])


def test_the_length_of_a_list_that_lies(tmp_path, content):
    place = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    refused(tmp_path, content[:place] + struct.pack("<Q", 2**40) + content[place + 8 :])


@pytest.mark.parametrize("dimension", [2**62, 2**33, 0])
def test_the_shape_of_a_tensor_that_lies(tmp_path, content, dimension):
    place = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4
    refused(tmp_path, content[:place] + struct.pack("<Q", dimension) + content[place + 8 :])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(4, 9000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3))
def test_any_bytes_in_a_header(tmp_path_factory, content, changes):
    directory, spoilt = tmp_path_factory.mktemp("spoilt"), bytearray(content)
    for place, new in changes:
        spoilt[place : place + len(new)] = new
    path = directory / "spoilt.gguf"
    path.write_bytes(spoilt)
    try:
        convert(path, directory / "out")
    except ModelError as error:
        assert str(path) in str(error)  # noqa: PT017  or nothing that counts was changed
        assert not (directory / "out").exists()
