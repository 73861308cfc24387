"""What several areas ask of the operating system. It imports nothing of ours, so everybody may import it."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of the container that this process is in


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, cut down to a container's quota, of which a part counts as one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cgroup("cpu.max", "cpu/cpu.cfs_quota_us").split()
    if not quota or not quota[0].isdigit():  # "max" or "-1": no quota
        return cores
    period = quota[1] if len(quota) > 1 else read_cgroup("cpu/cpu.cfs_period_us") or "100000"
    return max(1, min(cores, -(-int(quota[0]) // int(period))))


def read_cgroup(*names: str) -> str:
    """The first of these files that exists (versions 1 and 2 of cgroups have other names); empty when none does."""
    for name in names:
        path = CGROUP / name
        if path.is_file():
            return path.read_text().strip()
    return ""
