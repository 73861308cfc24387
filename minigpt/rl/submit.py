"""Run a command on a Ray cluster: send the code, follow the log, end as the job ends.

`launch/ray_submit.sh` runs this. `ray job submit` does nearly the same, but it returns 1 for every failure, packs
whatever lies in the folder, and leaves the commands that reattach or stop for the reader to compose.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from minigpt.errors import UserError
from minigpt.rl.cluster import SUBMITTED, use_token, wrong_token

MAX_MEGABYTES = 100  # the head keeps the package in memory; code is far smaller, so what is larger is data by mistake
PROGRAM = "./launch/ray_submit.sh"


@dataclass
class SubmitOptions:
    """Options of a submission; the command comes after `--`.

    Args:
        address: The cluster's job server. None: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265.
        working_dir: Folder whose files under git's control are sent; the command runs in a copy of it on the head node.
        follow: Id of a job that was submitted before: show its log and end as it ends.
        stop: Id of a job that shall end: it gets SIGTERM, and SIGKILL when it does not end by itself.
    """

    address: str | None = None
    working_dir: Path = Path(".")
    follow: str | None = None
    stop: str | None = None


def submit(options: SubmitOptions, command: Sequence[str]) -> int:
    """Run `command` on the cluster, or follow or stop a job that is there.

    Returns:
        The job's exit status; 128 + n if signal n ended it; 143 if it was stopped.

    Raises:
        UserError: No command, no cluster, a token that the cluster refuses, files that the job would miss.
    """
    if (options.follow or options.stop) and command:
        raise UserError("--follow and --stop take a job that is there already: leave out the command, or them")
    if not (options.follow or options.stop or command):
        raise UserError(f"which command? {PROGRAM} --address http://HEAD:8265 -- minigpt train grpo …")
    files = _tracked_files(options.working_dir) if command else []
    _check_paths(options.working_dir, files, command)
    _check_size(options.working_dir, files)
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    client = _client(address if "://" in address else f"http://{address}")
    job = options.follow or options.stop or _send(client, options.working_dir, files, command)
    try:
        if options.stop:
            client.stop_job(job)
        return _follow(client, job)
    except KeyboardInterrupt:
        print(f"\nno longer following {job}; it goes on.\n{_commands(client, job)}", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        if "does not exist" in str(error):
            raise UserError(f"there is no job {job} on {client.get_address()}") from error
        print(_commands(client, job), file=sys.stderr)
        raise UserError(f"the connection to {client.get_address()} broke ({error}); the job may go on") from error


def _client(address: str) -> JobSubmissionClient:
    use_token()
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(wrong_token(address)) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"no job server answers at {address}: is the head up (./launch/ray_cluster.sh head)? It listens to its own "
            "machine only, unless --dashboard-host says otherwise; from elsewhere: ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from error


def _send(client: JobSubmissionClient, folder: Path, files: Sequence[str], command: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "working_dir.zip"
        _pack(folder, files, package)
        # Ray runs the command with OMP_NUM_THREADS=1, which would leave a trainer with one core.
        entrypoint = "exec " + shlex.join(["env", "-u", "OMP_NUM_THREADS", f"{SUBMITTED}=1", *command])
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(package)})
    print(f"job {job} on {client.get_address()}\n{_commands(client, job)}", file=sys.stderr)
    return job


def _commands(client: JobSubmissionClient, job: str) -> str:
    here = f"{PROGRAM} --address {client.get_address()}"
    return f"  follow it again: {here} --follow {job}\n  stop it:         {here} --stop {job}"


def _tracked_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of the files under git's control that are there. Says which others stay here."""

    def listed(*kind: str) -> list[str]:
        done = subprocess.run(["git", "ls-files", "-z", *kind], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{folder}: git does not list its files ({done.stderr.strip()}): submit from a checkout")
        return [name for name in done.stdout.split("\0") if name and (folder / name).is_file()]

    untracked = listed("--others", "--exclude-standard")
    if untracked:
        named = ", ".join(untracked[:3]) + (", …" if len(untracked) > 3 else "")
        print(f"note: git does not track {named}: not sent (git add what the job needs)", file=sys.stderr)
    return listed("--cached")


def _check_paths(folder: Path, files: Sequence[str], command: Sequence[str]) -> None:
    """Refuse paths that mean something here and nothing, or something that is thrown away, on the cluster."""
    sent = {parent for name in files for parent in (Path(name), *Path(name).parents)}
    for flag, argument in zip(["", *command], command, strict=False):
        name, _, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        path = Path(value)
        if not value or path.is_absolute():
            continue
        if name == "--save_dir":
            raise UserError(f"--save_dir {value} would be thrown away with the job's folder: give an absolute path")
        if os.path.exists(folder / path) and Path(os.path.normpath(path)) not in sent:
            raise UserError(
                f"{value} is not sent with the code, since git does not track it: give an absolute path that is good "
                "on every node"
            )


def _check_size(folder: Path, files: Sequence[str]) -> None:
    sizes = {name: (folder / name).stat().st_size for name in files}
    if sum(sizes.values()) > MAX_MEGABYTES * 1e6:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        raise UserError(
            f"the files of {folder} under git's control have {sum(sizes.values()) / 1e6:.0f} MB, more than the "
            f"{MAX_MEGABYTES} MB that are sent; the largest: "
            + ", ".join(f"{name} ({sizes[name] / 1e6:.0f} MB)" for name in largest)
        )


def _pack(folder: Path, files: Sequence[str], package: Path) -> None:
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files:  # by content only, without times: what was sent before is not sent again
            archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)


def _follow(client: JobSubmissionClient, job: str) -> int:
    client.get_job_info(job)  # is there such a job? The log's answer would be less clear
    failures: list[Exception] = []

    def read() -> None:
        try:
            asyncio.run(_print_log(client, job))
        except Exception as error:
            failures.append(error)

    # In a thread of its own, so that Ctrl-C need not wait until the server has closed the connection (10 s and more)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join()
    if failures:
        raise failures[0]
    while not (info := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.2)
    if info.status == JobStatus.SUCCEEDED:
        print(f"job {job} succeeded", file=sys.stderr)
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"job {job} was stopped", file=sys.stderr)
        return 143
    status = info.driver_exit_code
    if status is None:  # it never ran, or its node died: nothing of this stands in the log
        print(f"job {job} failed: {info.message}", file=sys.stderr)
        return 1
    print(f"job {job} failed with exit status {status}; its log stands above", file=sys.stderr)
    return 128 - status if status < 0 else status


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _leave(status: int) -> None:
    """End now: at Ctrl-C a thread still reads the log, which Python could wait for or stumble over at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    from minigpt.cli import run_command

    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if end == len(arguments) and not any(a.startswith(("-h", "--h", "--follow", "--stop")) for a in arguments):
        sys.exit(f"error: write -- before the command: {PROGRAM} --address http://HEAD:8265 -- minigpt train grpo …")
    command = arguments[end + 1 :]
    run_command(lambda options: _leave(submit(options, command)), SubmitOptions, arguments[:end], PROGRAM)
