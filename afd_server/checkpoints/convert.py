"""`afd convert IN OUT`: a GGUF file becomes a Hugging Face directory.

transformers reads the file (weights, configuration and tokenizer); here its result is completed and written. The reading
needs the `convert` extra: transformers, gguf, accelerate. Called by cli and by `default_model`; no server needs it.

Weights are written in float32 unless asked otherwise, and a server's `--dtype auto` follows the file. GGUF weights are
quantised: scale x integer + offset, which float32 holds exactly and bfloat16 rounds once more. Float32 is also what every
CPU computes well, and what makes the upcycled mixture of experts repeat the dense model token for token. A CPU with
bfloat16 instructions (`avx512_bf16` or `amx_bf16` in /proc/cpuinfo) is about twice as fast in bfloat16, and reads half the
bytes: serve with `--dtype bfloat16` there. The file itself can stay in float32.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from afd_server.checkpoints.output import check_output, staged_directory
from afd_server.errors import ConfigError, ModelError

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16")

# llama.cpp's names (`tokenizer.ggml.pre`) of byte-pair tokenizers that cut text by GPT-2's expression and nothing else,
# which is what transformers assumes of any it does not know.
_PLAIN_GPT2 = ("gpt-2", "default", "")


def convert(
    source: Path, out: Path, dtype: str = "float32", sampling: Mapping[str, float] | None = None
) -> None:
    """Write the model of GGUF file `source` (or of a directory that holds a single one) as directory `out`.

    `out` holds config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and, where
    the file has one, chat_template.jinja. It appears when it is complete. dtype: of the weights on disk. sampling: what the
    model's makers recommend, for generation_config.json; a GGUF file does not say it.

    Raises ConfigError for `out` or `dtype`, ModelError for `source`.
    """
    if dtype not in DTYPES:
        raise ConfigError("--dtype", f"{dtype!r} is not one of {', '.join(DTYPES)}")
    check_output(out)
    gguf_file = _find_gguf(source)
    with _stages(f"Converting {gguf_file.name}") as stage, staged_directory(out) as staging:
        stage("loading the libraries")
        _import_readers()
        with _reading(gguf_file):
            stage("reading the metadata")
            metadata = _read_metadata(gguf_file)
            stage("reading the weights")
            config = _write_model(gguf_file, metadata, staging, dtype, sampling or {})
            stage("rebuilding the tokenizer")
            _write_tokenizer(gguf_file, metadata, staging, config)
    _warn_of_unknown_rule(metadata)


def _find_gguf(source: Path) -> Path:
    if source.is_dir():
        found = sorted(source.glob("*.gguf"))
        if len(found) != 1:
            raise ModelError(f"{source}: holds {len(found)} .gguf files; name one file")
        source = found[0]
    if not source.is_file():
        raise ModelError(f"{source}: no such file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{source}: is not a GGUF file")
    return source


@contextmanager
def _stages(title: str) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is being done and for how long."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=None)
        yield lambda doing: progress.update(task, description=f"{title}: {doing}")
        progress.update(task, description=f"{title}: done", total=1, completed=1)


def _import_readers() -> None:
    try:
        import accelerate  # noqa: F401  transformers will not read GGUF weights without it
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ModelError(
            f"reading GGUF files needs the package {error.name}; install it with: pip install 'afd-server[convert]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _reading(gguf_file: Path) -> Iterator[None]:
    """The libraries report a damaged or unknown file by many exceptions: any of them means that it cannot be read.

    What they print to stderr meanwhile is a second progress display, which would write over ours.
    """
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except (ModelError, ConfigError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{gguf_file}: cannot be read as a model: {error}") from error


def _write_model(
    gguf_file: Path, metadata: dict[str, Any], staging: Path, dtype: str, sampling: Mapping[str, float]
) -> Any:
    """Configuration and weights. Written directly: the loaded model takes itself for quantised and will not save."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent), gguf_file=gguf_file.name, dtype=torch.float32
    )
    config = model.config
    wanted = getattr(torch, dtype)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else ()
    tensors = {
        name: tensor.to(wanted).contiguous() for name, tensor in model.state_dict().items() if name not in tied
    }
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})

    for leftover in ("quantization_config", "_model_name_or_path"):  # of the GGUF, not of what is written here
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.architectures = [type(model).__name__]
    config.dtype = wanted
    config.save_pretrained(staging)
    generation = model.generation_config
    generation.eos_token_id = _end_of_sequence(metadata, config.eos_token_id)
    generation.update(**sampling, do_sample=bool(sampling))
    generation.save_pretrained(staging)
    _drop_keys(
        staging / "generation_config.json", "_from_model_config"
    )  # its eos ids may differ from config.json's
    return config


def _end_of_sequence(metadata: dict[str, Any], eos_token_id: int | list[int] | None) -> int | list[int] | None:
    """The ids that end an answer: some files name the end of a turn apart from the end of the text."""
    known = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn not in known:
        known.append(int(end_of_turn))
    return known[0] if len(known) == 1 else known or None


def _write_tokenizer(gguf_file: Path, metadata: dict[str, Any], staging: Path, config: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    _repair_pre_tokenizer(metadata, tokenizer.backend_tokenizer)
    if getattr(config, "max_position_embeddings", None):
        tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(staging)
    # How it was loaded here is nothing of the tokenizer.
    _drop_keys(staging / "tokenizer_config.json", "is_local", "local_files_only")


def _drop_keys(path: Path, *keys: str) -> None:
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _repair_pre_tokenizer(metadata: dict[str, Any], tokenizer: Any) -> None:
    """transformers rebuilds a byte-pair tokenizer without `tokenizer.ggml.pre`, the rule that cuts text before merging.

    For SmolLM that loses "every digit apart", which moves the cut between spaces and a following digit.
    """
    from tokenizers import pre_tokenizers

    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _warn_of_unknown_rule(metadata: dict[str, Any]) -> None:
    """Not within `_reading`, which hides what is printed to stderr."""
    rule = metadata.get("tokenizer.ggml.pre", "")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and rule not in ("smollm", *_PLAIN_GPT2):
        log.warning("pre-tokenizer %r: taken as transformers rebuilds it, which may cut text differently", rule)


def _read_metadata(gguf_file: Path) -> dict[str, Any]:
    """The file's scalars that transformers does not pass on."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    names = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id")
    return {name: field.contents() for name in names if (field := reader.get_field(name)) is not None}
