"""A checkpoint comes from somewhere else: whatever its files hold, the end is a model or one error that names the file."""

import json
import os
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from afd_server.errors import ModelError
from afd_server.models.checkpoint import check_checkpoint, load_attention_half, load_ffn_half
from afd_server.models.families import read_model_spec
from afd_server.models.halves import FFNShard
from afd_server.text.chat_template import ChatTemplate
from afd_server.text.generation_defaults import read_generation_defaults
from afd_server.text.tokenizer import Tokenizer
from tests.checkpoints import FAMILIES, write_checkpoint, write_tokenizer
from tests.unit.models.served import CPU
from tests.unit.models.test_checkpoint import change

import torch  # isort: skip

WHERE = {"device": CPU, "dtype": torch.float32, "gate_on": "attention"}
MAX_BYTES = 256 * 2**20


@pytest.fixture(scope="module", params=[*FAMILIES, "step3"])
def family_directory(request, tmp_path_factory):
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama, tmp_path):
    """A llama whose files may be spoilt."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def start(directory):
    """All that reads weights at a start."""
    spec = read_model_spec(directory)
    check_checkpoint(directory, spec)
    load_attention_half(directory, spec, **WHERE)
    load_ffn_half(directory, spec, FFNShard(0, 1, 0, 1), **WHERE)


def refused(directory, file_name):
    """The refusal of a start, which must be one that names the file, and cheap."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            start(directory)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert str(directory / file_name) in str(caught.value)
    return str(caught.value)


# --- config.json, generation_config.json -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, 2**31, -1, 0, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_any_key(family_directory, tmp_path, data):
    config = json.loads((family_directory / "config.json").read_text())
    section = config
    if "rope_parameters" in config and data.draw(st.booleans()):
        section = config["rope_parameters"]
    for key in data.draw(st.lists(st.sampled_from(sorted(section)), min_size=1, max_size=2)):
        section[key] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        spec = read_model_spec(tmp_path)
        check_checkpoint(family_directory, spec)
    except ModelError as error:
        assert str(tmp_path / "config.json") in str(error) or str(family_directory) in str(error)  # noqa: PT017
        return
    assert spec.num_layers <= 4096


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe{}", b"null", b'"x"'],
)  # fmt: skip
def test_a_damaged_json_file(copy, name, content):
    (copy / name).write_bytes(content)
    refused(copy, name)


def test_an_index_whose_map_is_none(copy):
    (copy / "model.safetensors.index.json").write_bytes(b'{"weight_map": 5}')
    refused(copy, "model.safetensors.index.json")


def test_a_json_file_without_an_end(copy, monkeypatch):
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to("/dev/zero")
    assert "there is no config.json" in refused(copy, "")
    monkeypatch.setattr("afd_server.models.config_file.MAX_JSON_BYTES", 100)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(" " * 101)
    assert "is larger than 100 bytes" in refused(copy, "config.json")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "num_hidden_layers", 2**31 - 1),
        ("llama", "intermediate_size", 2**31 - 1),
        ("llama", "vocab_size", 10**400),
        ("mixtral", "num_local_experts", 2**31 - 1),
        ("qwen3_moe", "num_experts", 2**31 - 1),
        ("qwen3_moe", "moe_intermediate_size", 2**31 - 1),
        ("deepseek_v3", "n_shared_experts", 2**31 - 1),
        ("deepseek_v3", "first_k_dense_replace", 2**31 - 1),
    ],
)  # fmt: skip
def test_a_wild_number_costs_nothing(tmp_path, family, key, value):
    directory = write_checkpoint(family, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    refused(directory, "")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["temperature", "top_p", "top_k", "max_new_tokens", "eos_token_id"]), JSON, max_size=3
    )
)
def test_any_generation_config(copy, values):
    (copy / "generation_config.json").write_text(json.dumps(values))
    for read in (read_generation_defaults, read_model_spec):
        try:
            read(copy)
        except ModelError as error:
            assert str(copy) in str(error)  # noqa: PT017


# --- safetensors -----------------------------------------------------------------------------------------------------


def rewrite(path, edit):
    """Applies `edit` to the header of a safetensors file, as a dictionary."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"


def point(name, *offsets):
    def edit(header):
        header[name]["data_offsets"] = list(offsets)

    return edit


def overlap(header):
    header[Q]["data_offsets"] = header["model.layers.0.self_attn.o_proj.weight"]["data_offsets"]


def set_to(name, **values):
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    "edit",
    [
        point(Q, 0, 10**12), point(Q, 10**12, 10**12 + 16384), point(Q, 16384, 0), point(Q, -1, 5), point(Q, 0, 2**64), overlap,
        set_to(Q, shape=[2**40, 2**40]), set_to(Q, shape=[-64, -64]), set_to(Q, shape="64"), set_to(Q, dtype="F31"),
        set_to(Q, shape=[64, 63]), set_to(Q, shape=[]), set_to(Q, dtype=5), lambda header: header.pop(Q),
        lambda header: header.clear(), lambda header: header.update({Q: 5}), lambda header: header.update(more=header[Q]),
        lambda header: header.update(__metadata__=5),
    ],
)  # fmt: skip
def test_a_header_that_lies(copy, edit):
    rewrite(copy / "model.safetensors", edit)
    refused(copy, "model.safetensors")


@pytest.mark.parametrize("claimed", [10 * 2**30, 2**64 - 1, 0, 1, 99_999_999])
def test_a_header_of_a_claimed_length(copy, claimed):
    path = copy / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + path.read_bytes()[8:])
    refused(copy, "model.safetensors")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 500, -1, -100_000])
def test_a_truncated_file(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(copy, "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool, torch.float64])
def test_weights_of_another_type(copy, dtype):
    """Converted they would be a model of noise, without a word."""
    change(copy, {K: torch.zeros(32, 64, dtype=dtype)})
    assert f"{K} is of type" in refused(copy, "model.safetensors")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_any_bytes_in_a_header(llama, copy, changes):
    content = bytearray((llama / "model.safetensors").read_bytes())
    for place, new in changes:
        content[place : place + len(new)] = new
    (copy / "model.safetensors").write_bytes(content)
    try:
        start(copy)
    except ModelError as error:
        assert str(copy / "model.safetensors") in str(error)  # noqa: PT017  or nothing that counts was changed


# --- an index --------------------------------------------------------------------------------------------------------


def index(directory, **weight_map):
    names = json.loads((directory / "names.json").read_text())
    files = {"weight_map": {**dict.fromkeys(names, "model.safetensors"), **weight_map}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(files))


@pytest.fixture
def indexed(copy):
    from safetensors.torch import load_file

    (copy / "names.json").write_text(json.dumps(list(load_file(copy / "model.safetensors"))))
    index(copy)
    start(copy)
    return copy


@pytest.mark.parametrize(
    "elsewhere",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "./model.safetensors", "sub/../x", 5, None,
     ["model.safetensors"], "\x00", "x" * 300],
)  # fmt: skip
def test_an_index_points_at_files_beside_it_alone(indexed, elsewhere):
    index(indexed, **{Q: elsewhere})
    refused(indexed, "")


def test_an_index_that_names_what_is_no_file(indexed):
    os.mkfifo(indexed / "pipe")
    (indexed / "loop").symlink_to("loop")
    (indexed / "directory").mkdir()
    for name in ("pipe", "loop", "directory", "missing"):
        index(indexed, **{Q: name})
        assert "no such file" in refused(indexed, name)


def test_a_link_is_followed(indexed, tmp_path_factory):
    """The hub's own cache is made of links, so links are files as any other."""
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    (indexed / "model.safetensors").rename(blob)
    (indexed / "model.safetensors").symlink_to(blob)
    start(indexed)


def test_a_tensor_in_two_files_is_read_from_the_one_named(indexed):
    save_file({Q: torch.zeros(1, 1)}, indexed / "other.safetensors")
    start(indexed)
    index(indexed, **{Q: "other.safetensors"})
    assert f"{Q} has shape [1, 1]" in refused(indexed, "")


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    return (write_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json").read_bytes()


def load_text_side(directory):
    tokenizer = Tokenizer.load(directory)
    tokenizer.decode(tokenizer.encode("Hello <|end|> wörld"))
    assert tokenizer.eos_token_id is None or tokenizer.eos_token_id >= 0
    ChatTemplate.load(directory, tokenizer.special_tokens)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 6000), st.binary(max_size=6)), min_size=1, max_size=3), st.integers(0, 9)
)
def test_any_bytes_in_a_tokenizer(tokenizer_json, tmp_path, changes, cut):
    content = bytearray(tokenizer_json)
    for place, new in changes:
        content[place : place + cut] = new
    (tmp_path / "tokenizer.json").write_bytes(content)
    try:
        load_text_side(tmp_path)
    except ModelError as error:
        assert str(tmp_path / "tokenizer.json") in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b'{"version": "1.0", "model": {}}', b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}']
)  # fmt: skip
def test_a_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        load_text_side(tmp_path)


KEYS = ["eos_token", "bos_token", "additional_special_tokens", "chat_template", "pad_token"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(KEYS), JSON | st.builds(lambda value: [{"name": "default", "template": value}], JSON)
    )
)
def test_any_tokenizer_config(tokenizer_json, tmp_path, values):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    try:
        load_text_side(tmp_path)
    except ModelError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017


def test_a_template_that_is_no_text(tmp_path, tokenizer_json):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: cannot be read"):
        load_text_side(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * 1_000_001)
    with pytest.raises(ModelError, match="no text of at most 1000000 characters"):
        load_text_side(tmp_path)
