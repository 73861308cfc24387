"""What all tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts and data sets in `shared/data` beside the repository; they are not part of it, so tests that want
    them are skipped without them. Whatever such a test proves is also proved on generated data."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def shipped_tokenizer() -> Path:
    """The folder of the tokenizer that MiniGPT ships."""
    return REPOSITORY / "minigpt" / "model"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is one (`benchmarks/gpu.sh`); elsewhere they are left out, not failed."""
    import torch

    if torch.cuda.is_available() or config.option.collectonly:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
