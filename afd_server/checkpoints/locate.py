"""From the MODEL of the command line to a directory on this machine.

Called by cli and llm before anything is loaded. Whether the directory holds a model this server runs is `models/spec.py`'s
to say.
"""

from __future__ import annotations

import re
from pathlib import Path

from afd_server.errors import ModelError

# "name" or "owner/name": what the hub allows. Anything else can only be meant as a path.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")
_HUB_TIMEOUT_S = 10.0


def locate_model(name: str) -> Path:
    """The directory of model `name`: a directory as it is, else a hub name, downloaded unless it was before.

    Only configuration, tokenizer and safetensors files are fetched. Raises ModelError with the remedy.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            raise ModelError(
                f"{name}: is a GGUF file; run `afd convert {name} DIRECTORY` and serve the directory"
            )
        raise ModelError(f"{name}: is a file; MODEL is the directory with config.json")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"{name or repr(name)}: no such directory")
    return _download(name)


def _download(name: str) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), etag_timeout=_HUB_TIMEOUT_S))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name}: the hub asks for permission; accept its terms there, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{name}: neither a directory here nor a public model on the hub") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ModelError(
            f"{name}: no such directory here, and the hub cannot be reached; name a directory, or check the network"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"{name}: the hub's answer is no model: {str(error).splitlines()[0]}") from error
