"""Versions of weights on their way from the policy to the rollout workers, as the controller sees them.

A version is either in the object store, or it was broadcast and each worker holds it already. The last two can always
be had: what was broadcast stays in the memory of the policy's first rank too, which puts it into the store when
somebody needs it who did not receive it. Such a one is a worker that replaces a dead one and is asked for the version
of its predecessor's request, which with overlap is older than the policy is by now; so to broadcast again would not do.
Broken groups are not mended: the next version finds all members anew.
"""

from __future__ import annotations

from collections.abc import Callable

import ray

from .group import WorkerDied, WorkerGroup
from .publish import VERSIONS_KEPT, Published
from .transport import Backend, choose_transport, limit_within

GRACE_S = 10.0  # in which a member whose time is up tells so


class Delivery:
    """Who holds which version, and how the others get it.

    Args:
        policy: All its ranks publish, the first one sends.
        rollout: Who receives.
        say: Shows a sentence to the person who watches.
    """

    def __init__(self, policy: WorkerGroup, rollout: WorkerGroup, say: Callable[[str], None]) -> None:
        self.policy, self.rollout, self.say = policy, rollout, say
        self.backend: Backend | None = None
        self._joined = False
        self._versions: dict[int, list[Published]] = {}  # by rank of the policy: what it published
        self._held: dict[int, int] = {}  # by rank of the rollout worker: what it was handed last

    def setup(self, wanted: str) -> None:
        """Choose the transport, once all workers are up; `wanted` is auto, store or broadcast."""
        sender = self.policy.wait([self.policy.one(0, "gpu")], "name its device")
        self.backend = choose_transport(wanted, sender + self.rollout.wait(self.rollout.all("gpu"), "name its device"))

    def publish(self, version: int, all_listen: bool = True) -> list:
        """Make the policy's weights, as they are now, available; returns what its ranks return.

        Args:
            version: Their number.
            all_listen: Whether every rollout worker is there, and free: else nothing is broadcast.
        """
        receiving = None
        if self.backend is not None and all_listen:
            self._joined = self._joined or self._join(self.backend)
            receiving = self.rollout.all("receive", version) if self._joined else None
        results = self.policy.wait(self.policy.all("publish", version, receiving is not None), "publish")
        self._versions[version] = [result.value for result in results]
        if receiving:
            self._note_receipts(receiving, version)
        for old in sorted(self._versions)[:-VERSIONS_KEPT]:
            del self._versions[old]
        return results

    @property
    def _patience(self) -> float:
        return limit_within(self.policy.timeout) + GRACE_S

    def _join(self, backend: Backend) -> bool:
        address, plan = self.policy.wait([self.policy.one(0, "open_transport")], "find a port")[0]
        size, shared = 1 + len(self.rollout), ray.put(plan)
        sender = self.policy.one(0, "join_transport", backend, address, 0, size)
        receivers = [
            self.rollout.one(rank, "join_transport", backend, address, 1 + rank, size, shared)
            for rank in range(len(self.rollout))
        ]
        # All at once: one that is gone makes the others wait, and none of them longer than it may
        _, silent = ray.wait([sender, *receivers], num_returns=size, timeout=self._patience)
        gone: list[str] = []
        failed: list[str | None] = []
        for group, rank, answer in [(self.policy, 0, sender), *((self.rollout, *one) for one in enumerate(receivers))]:
            try:
                if answer in silent:
                    ended = group is self.rollout
                    gone.append(f"{group.role} worker {rank} does not answer{' and is ended' if ended else ''}")
                    if ended:
                        ray.kill(group.workers[rank])  # whoever waits for its answers need not wait for long
                else:
                    failed.append(group.result(answer, rank, "join the broadcast"))
            except WorkerDied as death:
                if group is self.policy:
                    raise
                gone.append(str(death))
        why = next(filter(None, [*gone, *failed]), None)
        if why is not None:
            self.say(f"no process group for the broadcast of weights ({why}); this version takes the object store")
        return why is None

    def _note_receipts(self, receiving: list[ray.ObjectRef], version: int) -> None:
        # The policy has sent everything, or has given up: all are done by now, or give up in the same time
        _, silent = ray.wait(receiving, num_returns=len(receiving), timeout=self._patience)
        for rank, answer in enumerate(receiving):
            who = "who replaces it"  # whoever waits for its answers does that
            try:
                if answer in silent:
                    failure = f"it did not answer within {self._patience:g} s and is ended"
                    ray.kill(self.rollout.workers[rank])
                else:
                    failure, who = self.rollout.result(answer, rank, "receive weights").value, "it"
            except WorkerDied as death:
                failure = str(death)
            if failure is None:
                self._held[rank] = version
                continue
            self.say(
                f"rollout worker {rank} did not receive version {version} ({failure}); {who} takes the object store"
            )
            self._held.pop(rank, None)
            self._joined = False

    def for_worker(self, rank: int, version: int) -> Published:
        """What a rollout worker is to load: only a version number, if it holds that version."""
        published = Published.by_all(self._versions[version])
        if self._held.get(rank) != version and not published.in_store:
            (published,) = self.policy.wait([self.policy.one(0, "store", version)], "store weights")
            self._versions[version] = [published]
        self._held[rank] = version
        return published

    def publisher_of(self, reference: str) -> int:
        """The rank of the policy that put an object of a version into the store; `reference` as in `InputLost`."""
        for published in self._versions.values():
            for rank, share in enumerate(published):
                if any(reference == one.hex() for bucket in share.buckets for one in bucket.data):
                    return rank
        return 0  # of a version that is kept no more, as what `store` makes

    def forget(self, rank: int) -> None:
        """A rollout worker was replaced: it holds nothing, and is in no group."""
        self._held.pop(rank, None)
        self._joined = False
