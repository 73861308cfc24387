"""The Ray actors: policy, critic, reference, reward model, rollout.

Plain classes: the controller wraps them (`group.py`), tests may call them without Ray. What they are handed by Ray is
shared, read-only memory; nothing here writes into it. Batches come whole and every rank takes its own part, which it
computes from the batch alone, so nothing has to be scattered and put back in order.

Every method that computes returns the seconds that it computed for, so that the controller can tell what Ray costs.
"""

from .base import Job, Timed, Worker
from .critic import CriticWorker
from .frozen import ReferenceWorker, RewardWorker
from .policy import PolicyStage, PolicyWorker
from .rollout import RolloutWorker

__all__ = [
    "CriticWorker",
    "Job",
    "PolicyStage",
    "PolicyWorker",
    "ReferenceWorker",
    "RewardWorker",
    "RolloutWorker",
    "Timed",
    "Worker",
]
