"""A file of weights is whole and on the disk, or as it was."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from minigpt.errors import UserError
from minigpt.trainer.weights import write_state_dict


def test_weights_are_on_the_disk_before_they_take_the_place_of_others(tmp_path, monkeypatch):
    """What is synced and renamed, in order: else a power cut leaves a name and nothing behind it."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def seen_replace(source, target) -> None:
        events.append(f"{Path(source).name} becomes {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_state_dict(tmp_path / "w.pth", {"a": torch.ones(3)})
    assert events == ["sync w.pth.partial", "w.pth.partial becomes w.pth", f"sync {tmp_path.name}"]


def test_a_full_disk_is_one_sentence_and_the_old_weights_stay(tmp_path):
    path = write_state_dict(tmp_path / "w.pth", {"a": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"w\.pth: cannot be written \(.*\); make room and run") as caught:
            write_state_dict(path, {"a": torch.zeros(30_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.load(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
