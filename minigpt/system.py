"""What several areas ask of the operating system. It imports nothing of ours, so everybody may import it."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of the container that this process is in


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folders() -> Iterator[Path]:
    """Folders for what can be made again, the user's cache first; then one among the temporary files, the user's alone.

    Code is loaded from there, so a folder that somebody else could write to is none. Nor is one that cannot be made.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: no HOME, and a user without an entry in the passwd file
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minigpt"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    with suppress(OSError):
        folder = Path(tempfile.gettempdir()) / f"minigpt-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            yield folder


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
