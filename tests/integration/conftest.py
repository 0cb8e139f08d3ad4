"""What several tests serve."""

import pytest

from tests.checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """A small mixture of experts. Not to be written to."""
    return write_tokenizer(write_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "model"))
