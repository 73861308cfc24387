"""Models alone, whatever engine another test had in this process before."""

import pytest
import torch


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch):
    """DeepSpeed's ZeRO-3 replaces `F.linear` for the rest of the process; with a bias it rounds differently."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
