"""Ray for real: a cluster of two nodes made by the scripts, jobs on it, layouts compared with it, a private Ray, and
nothing left behind by either.

Every process of a cluster inherits a mark in its environment; what carries it has to be gone at the end.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
import pytest
import ray
import tiny_rewards
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from tiny_rl import MARK, marked, metrics_of, run_here, wait_until, write_world

from minigpt import cli
from minigpt.errors import UserError
from minigpt.rl.cluster import SUBMITTED, check_resources, connect, disconnect
from minigpt.rl.group import WorkerGroup, place
from minigpt.rl.layout import Role, bundles, laptop
from minigpt.rl.roles import Roles
from minigpt.rl.submit import SubmitOptions, submit

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """Unix sockets have names of 107 bytes at most, and Ray's are long: not under pytest's folders."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Scripts:
    """The two scripts, with state, token and processes of their own, called from within `folder`."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def token_file(self) -> Path:
        return self.folder / "secrets" / "token"

    @property
    def environment(self) -> dict[str, str]:
        own = {"TMPDIR": str(self.folder), "RAY_AUTH_TOKEN_PATH": str(self.token_file), MARK: self.mark}
        return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test suite in the background ignores Ctrl-C, and its children would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def node_options(self, name: str, cpus: int, gpus: int) -> list[str]:
        """Two nodes and other people's Ray share this machine: ports and folders that nobody else has."""
        return [
            f"--temp-dir={self.folder / name}",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            "--object-store-memory=100000000",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--dashboard-agent-listen-port={free_port()}",
        ]


@dataclass
class Cluster(Scripts):
    """A head with 2 CPUs and 1 GPU, and a second node with 1 CPU and 2 GPUs (which Ray is told, and are not there)."""

    printed: str = ""

    def start_nodes(self) -> None:
        ports = [f"--port={free_port()}", f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        head = self.run("ray_cluster.sh", "head", *ports, *self.node_options("h", cpus=2, gpus=1))
        assert head.returncode == 0, head.stderr
        self.printed = head.stdout
        worker = self.run("ray_cluster.sh", "join", self.address, *self.node_options("w", cpus=1, gpus=2))
        assert worker.returncode == 0, worker.stderr

    @property
    def address(self) -> str:
        """As `head` printed it for the other machines."""
        return re.search(r"^  \./launch/ray_cluster\.sh join (\S+)$", self.printed, re.MULTILINE)[1]

    @property
    def job_server(self) -> str:
        return re.search(r"^  \./launch/ray_submit\.sh --address (\S+) -- ", self.printed, re.MULTILINE)[1]

    def submit(self, *command: str, working_dir: Path = Path("code")) -> subprocess.Popen[str]:
        where = ["--address", self.job_server, "--working_dir", str(working_dir)]
        return self.start("ray_submit.sh", *where, "--", *command)


def make_checkout(folder: Path) -> None:
    """What a job is submitted from: a tracked file, one that git does not know, and one that it ignores."""
    folder.mkdir()
    (folder / "job.py").write_text(
        "import os, pathlib\n"
        "print('files:', sorted(map(str, pathlib.Path('.').iterdir())))\n"
        "print('threads:', os.environ.get('OMP_NUM_THREADS'))\n"
    )
    (folder / ".gitignore").write_text("data\n")
    (folder / "data").write_text("large\n")
    (folder / "notes.txt").write_text("not added\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "job.py", ".gitignore"], cwd=folder, check=True)


@pytest.fixture(scope="module")
def cluster(short_folder) -> Iterator[Cluster]:
    cluster = Cluster(short_folder)
    make_checkout(short_folder / "code")
    try:
        cluster.start_nodes()
        yield cluster
    finally:
        cluster.run("ray_cluster.sh", "stop")


# What needs no cluster


def test_a_job_keeps_nothing_in_its_own_folder(tmp_path, monkeypatch, capsys):
    """Also the folder that no option names."""
    monkeypatch.setenv(SUBMITTED, "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["train", "grpo", f"--init={tmp_path}"])
    assert "--save_dir out/grpo would be thrown away with the job's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("ray_cluster.sh", "use head, join ADDRESS or stop"),
        ("ray_cluster.sh start", "there is no command start; use head, join ADDRESS or stop"),
        ("ray_cluster.sh join", "join which cluster?"),
        ("ray_cluster.sh join http://head:8265", "http://head:8265 is not the address of a head node"),
        ("ray_cluster.sh join 127.0.0.1:1", "no token for 127.0.0.1:1, .*: copy ~/.ray/auth_token from the head"),
        ("ray_cluster.sh head --colour red", "Ray did not start; its reason stands above"),
        ("ray_submit.sh minigpt train", "write -- before the command"),
        ("ray_submit.sh --working_dir nowhere -- ls", "nowhere: No such file or directory"),
    ],
)
def test_bad_input_is_answered_by_one_sentence(command, sentence, tmp_path):
    done = Scripts(tmp_path).run(*command.split())
    assert done.returncode == 1, done.stdout
    assert re.search(f"^error: .*{sentence}", done.stderr, re.MULTILINE), done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "command", "sentence"),
    [
        ({}, "", "which command?"),
        ({"stop": "x"}, "ls", "--follow and --stop take a job that is there already"),
        ({}, "minigpt train grpo --save_dir out/x", "--save_dir out/x would be thrown away .* give an absolute path"),
        ({}, "minigpt train grpo --save_dir=out/x", "--save_dir out/x would be thrown away .* give an absolute path"),
        ({}, "minigpt train grpo --data=data", "data is not sent with the code, since git does not track it"),
        ({}, "minigpt train grpo --data ./data", "./data is not sent with the code, since git does not track it"),
        ({"address": "127.0.0.1:1"}, "python job.py", "no job server answers at http://127.0.0.1:1"),
        ({"address": "127.0.0.1:1"}, f"python -c {'x' * 300}", "no job server answers at http://127.0.0.1:1"),
        ({"working_dir": Path("/")}, "ls", "git does not list its files .*: submit from a checkout"),
    ],
)
def test_submit_refuses_what_cannot_work(options, command, sentence, tmp_path, monkeypatch):
    make_checkout(tmp_path / "code")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(UserError, match=sentence):
        submit(SubmitOptions(**{"working_dir": tmp_path / "code", **options}), command.split())


def test_a_package_that_is_too_large_names_the_largest_files(tmp_path):
    make_checkout(tmp_path / "code")
    with (tmp_path / "code" / "weights.bin").open("wb") as file:
        file.truncate(101_000_000)
    subprocess.run(["git", "add", "weights.bin"], cwd=tmp_path / "code", check=True)
    with pytest.raises(UserError, match=r"101 MB, more than the 100 MB that are sent; .* weights.bin \(101 MB\)"):
        submit(SubmitOptions(working_dir=tmp_path / "code"), ["ls"])


def test_help_teaches_the_three_commands(tmp_path):
    done = Scripts(tmp_path).run("ray_cluster.sh", "--help")
    assert done.returncode == 0
    assert all(f"./launch/ray_cluster.sh {command}" in done.stdout for command in ("head", "join ADDRESS", "stop"))
    assert "RAY_AUTH_TOKEN_PATH" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://head:8265", "http://head:8265 is not the address of a head node"),
        ("ray://head:10001", "from elsewhere, ./launch/ray_submit.sh"),
        ("head", "write host:port"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: is its head up"),
    ],
)
def test_connect_says_what_is_wrong_with_an_address(address, sentence, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(UserError, match=sentence):
        connect(address)
    assert not ray.is_initialized()


# A cluster of two nodes


def test_head_makes_a_token_that_only_its_owner_can_read(cluster):
    assert cluster.token_file.stat().st_mode & 0o777 == 0o600
    assert len(cluster.token_file.read_text()) == 64


def answer_of_head(address: str, token: str | None) -> grpc.StatusCode:
    """Ask a head for its cluster's id, the first thing that any Ray process does."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        metadata = [("authorization", f"Bearer {token}")] if token else []
        return ask.with_call(b"", metadata=metadata, timeout=10)[1].code()


def refused(address: str, token: str | None) -> bool:
    with pytest.raises(grpc.RpcError) as error:
        answer_of_head(address, token)
    return error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_head_answers_nobody_without_its_token(cluster):
    assert answer_of_head(cluster.address, cluster.token_file.read_text()) == grpc.StatusCode.OK
    assert refused(cluster.address, None)
    assert refused(cluster.address, "0" * 64)


@pytest.mark.parametrize("token", [{"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN_PATH": os.devnull}])
def test_a_job_without_the_right_token_is_refused_in_one_sentence(cluster, token):
    command = ["--address", cluster.job_server, "--working_dir", "code", "--", "touch", str(cluster.folder / "ran")]
    done = cluster.run("ray_submit.sh", *command, **token)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "or one that is refused there: copy ~/.ray/auth_token from the head" in done.stderr
    assert not (cluster.folder / "ran").exists()


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("running", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def jobs(cluster) -> dict[str, subprocess.Popen[str]]:
    """Submitted at the same time, since a job takes Ray some seconds to start."""
    programs = {
        "three": "raise SystemExit(3)",
        "raises": "def reward():\n    return 1 / 0\nreward()",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "sleeper": SLEEPER,
    }
    jobs = {name: cluster.submit("python", "-c", program) for name, program in programs.items()}
    return jobs | {"good": cluster.submit("python", "job.py")}


def test_a_job_has_the_tracked_files_and_all_threads(jobs):
    out, err = jobs["good"].communicate(timeout=300)
    assert jobs["good"].returncode == 0
    assert "files: ['.gitignore', 'job.py']" in out
    assert "threads: None" in out
    assert "note: git does not track notes.txt: not sent" in err


@pytest.mark.parametrize(
    ("name", "status", "printed"),
    [("three", 3, ""), ("raises", 1, r"in reward\n(.*\n)*ZeroDivisionError: division by zero\n"), ("killed", 137, "")],
)
def test_a_job_that_fails_ends_with_its_own_status_and_shows_its_traceback(jobs, name, status, printed):
    out, err = jobs[name].communicate(timeout=300)
    assert jobs[name].returncode == status
    assert re.search(printed, out)
    assert re.search(r"job \S+ failed with exit status -?\d+; its log stands above\n$", err)


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_come_back_and_how_to_stop_it(cluster, jobs):
    job = jobs["sleeper"]
    assert any(line == "running\n" for line in job.stdout)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130
    after = err.partition("no longer following")[2]
    stop = re.search(r"\./launch/ray_submit\.sh (--address \S+ --stop \S+)$", after, re.MULTILINE)[1].split()
    follow = re.search(r"\./launch/ray_submit\.sh (--address \S+ --follow \S+)$", after, re.MULTILINE)[1].split()
    follower = cluster.start("ray_submit.sh", *follow)
    assert any(line == "running\n" for line in follower.stdout)
    stopped = cluster.run("ray_submit.sh", *stop)
    assert stopped.returncode == 143
    assert {"running", "saved"} <= set(stopped.stdout.splitlines())  # Ray's own lines may come between
    assert follower.communicate(timeout=60)[0].endswith("saved\n")
    assert follower.returncode == 143


def test_following_a_job_that_is_not_there_is_one_sentence(cluster):
    done = cluster.run("ray_submit.sh", "--address", cluster.job_server, "--follow", "nothing")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: there is no job nothing on {cluster.job_server}\n", done.stderr)


@pytest.fixture
def driver(cluster, monkeypatch) -> Iterator[None]:
    """This process as a driver of the cluster, as it is inside a submitted job."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_file))
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    connect()
    yield
    disconnect()


def test_connect_refuses_a_cluster_that_refuses_the_token(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(UserError, match=f"no token for {cluster.address}, or one that is refused there"):
        connect(cluster.address)
    assert "RAY_AUTH_MODE" not in os.environ  # what connect sets it takes back
    assert not ray.is_initialized()


LAYOUTS = [
    ("one role on each node", [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 2}], None),
    ("the small one first", [{"CPU": 1, "GPU": 1}, {"GPU": 1}, {"GPU": 1}], None),
    ("no GPUs", [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], None),
    ("fractions side by side", [{"GPU": 0.5}] * 6, None),
    ("too many GPUs", [{"CPU": 1, "GPU": 1}] * 4, r"needs 4 GPUs \(policy 1, rollout 3\) and the cluster has 3"),
    ("too many CPUs", [{"CPU": 1}] * 4, r"needs 4 CPUs \(policy 1, rollout 3\) and the cluster has 3"),
    ("more than a node has", [{"CPU": 1, "GPU": 3}], r"policy needs 3 GPUs and 1 CPU on one node"),
    ("no room beside the others", [{"GPU": 1}, {"CPU": 2, "GPU": 2}], r"rollout needs 2 GPUs and 2 CPUs on one node"),
    ("fractions that fill no GPU", [{"GPU": 0.6}] * 4, r"needs 0.6 GPUs on one node"),
    ("what the cluster does not know", [{"TPU": 1}], r"needs 1 TPU \(policy 1\) and the cluster has 0"),
]


@pytest.mark.parametrize(
    ("bundles", "sentence"), [layout[1:] for layout in LAYOUTS], ids=[name for name, *_ in LAYOUTS]
)
def test_layouts_are_judged_as_ray_judges_them(driver, bundles, sentence):
    roles = ["policy", *["rollout"] * (len(bundles) - 1)]
    if sentence is None:
        check_resources(bundles, roles)
    else:
        with pytest.raises(UserError, match=sentence):
            check_resources(bundles, roles)
    group = placement_group([dict(bundle) for bundle in bundles])
    assert group.wait(0.5 if sentence else 10.0) is (sentence is None)
    remove_placement_group(group)


def test_what_others_use_is_named(driver):
    holder = ray.remote(num_gpus=2)(threading.Event).remote()
    ray.get(holder.is_set.remote())
    check_resources([{"GPU": 1}], ["policy"])
    with pytest.raises(UserError, match=r"policy needs 2 GPUs on one node, and other jobs use what the cluster has"):
        check_resources([{"GPU": 2}], ["policy"], patience_s=0.5)
    ray.kill(holder)
    check_resources([{"GPU": 2}], ["policy"])  # waits until they are free again


# A Ray of our own

DRIVER = """
import os, signal, sys, threading
from minigpt.rl.cluster import connect, disconnect
import ray

def save(*_): ...
signal.signal(signal.SIGTERM, save)
connect(num_cpus=2)
assert signal.getsignal(signal.SIGTERM) is save

@ray.remote(num_cpus=1)
class Worker:
    def threads(self):
        import torch
        torch.set_num_threads(2)
        return torch.get_num_threads()
    def spin(self):
        while True: ...
    def crash_here(self):
        import ctypes
        ctypes.string_at(0)
"""


def start_driver(program: str, folder: Path, mark: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER + program],
        env=environment | {MARK: mark, "RAY_TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_private_ray_is_closed_to_others_shows_dead_actors_and_leaves_nothing(short_folder):
    program = """
worker = Worker.remote()
print(ray.get(worker.threads.remote()), ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
sys.stdin.readline()
try:
    ray.get(worker.crash_here.remote())
except ray.exceptions.ActorDiedError:
    print("died", flush=True)
sys.stdin.readline()
disconnect()
print({name for name in os.environ if name.startswith("RAY_AUTH")}, flush=True)
sys.stdin.readline()
"""
    mark = uuid.uuid4().hex
    driver = start_driver(program, short_folder, mark)
    try:
        threads, address, token = driver.stdout.readline().split()
        assert threads == "2"
        assert answer_of_head(address, token) == grpc.StatusCode.OK
        assert refused(address, None)
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert "died\n" in driver.stdout
        assert any("crash_here" in line for line in driver.stderr)
        driver.stdin.write("\n")
        driver.stdin.flush()
        said = (line for line in driver.stdout if "(raylet)" not in line)  # Ray reports the dead worker there too
        assert next(said) == "set()\n"
        assert wait_until(lambda: len(marked(mark)) == 1), marked(mark)  # the driver itself
    finally:
        driver.kill()
        driver.communicate()


def test_a_worker_without_gpus_sees_none_though_its_node_has_some(driver):
    """A node of this cluster has GPUs, as Ray was told; whoever asked for none would compute on the first of them."""
    worker = Role(workers=1, threads=1)
    needed = bundles({**laptop(), "rollout": worker}, ["rollout"])
    placement = place(needed, 60)
    group = WorkerGroup(seeing(), "rollout", {**laptop(), "rollout": worker}, needed, placement, (), 60.0)
    try:
        (seen,) = group.wait(group.all("seen"), "look")
        assert seen == ("", "cpu")
    finally:
        group.kill()
        remove_placement_group(placement)


def seeing() -> type:
    """A class that Ray sends along."""

    class Seeing:
        def __init__(self, *_: object) -> None: ...

        def seen(self) -> tuple[str | None, str | None]:
            return os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("DS_ACCELERATOR")

    return Seeing


# Whole runs on the cluster


def grpo(folder: Path, save_dir: str, *options: str) -> list[str]:
    """A run on what `world` put into a folder."""
    return [
        *("train", "grpo", f"--data={folder / 'prompts'}", f"--init={folder / 'sft'}"),
        *(f"--reward={folder / 'tiny_rewards.py'}:letters", f"--deepspeed={folder / 'zero1.json'}"),
        *(f"--save_dir={folder / save_dir}", "--max_steps=10", "--prompts_per_step=4", "--samples_per_prompt=4"),
        *("--max_new_tokens=64", "--rollout_slots=4", "--batch_invariant=true", "--eval_prompts=2", "--dtype=fp32"),
        *("--save_interval=1", "--compile=false", "--tensorboard=false", "--threads=1", "--learning_rate=1e-3"),
        *options,
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder of all runs; a layout in it takes both nodes: the head has two CPUs, the other one has one."""
    root = write_world(tmp_path_factory.mktemp("world"))
    (root / "apart.yaml").write_text("policy: {workers: 1, cpus: 2}\nrollout: {workers: 1, cpus: 1}\n")
    shutil.copy(REPOSITORY / "ds_configs" / "zero1.json", root)
    shutil.copy(tiny_rewards.__file__, root)
    return root


def start(cluster: Cluster, world: Path, save_dir: str, *options: str) -> subprocess.Popen[str]:
    """In a folder of its own, with relative paths: the nodes' workers are in others."""
    command = [sys.executable, "-m", "minigpt", *grpo(Path(), save_dir, *options)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=world, env=cluster.environment, text=True, **output)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.pth")
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(cluster, world) -> Path:
    """A run with all roles on one node, which is what the others are compared with."""
    run = start(cluster, world, "alone", "--layout=laptop", f"--ray_address={cluster.address}")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    before, after = (weights_of(world / name)["model.norm.weight"] for name in ("sft", "alone"))
    assert not torch.equal(before, after), "it learned"
    return world / "alone"


def last_step(folder: Path) -> int:
    """The newest that has its checkpoint."""
    return max((int(path.parent.name[-8:]) for path in folder.glob("checkpoints/step_*/manifest.json")), default=0)


def wait_for_step(number: int, folder: Path, run: subprocess.Popen[str]) -> None:
    assert wait_until(lambda: last_step(folder) >= number or run.poll() is not None, 300), f"no step {number}"


def worker_amid(method: str, mark: str, run: subprocess.Popen[str]) -> psutil.Process:
    """The worker of a cluster that is in the middle of a method, which Ray puts into its process title.

    Those of its class are found first: to look at all processes takes longer than a tiny update."""

    def called(process: psutil.Process, start: str) -> bool:
        with contextlib.suppress(psutil.Error):  # it ended while we looked, or is not ours to look at
            return "".join(process.cmdline()[:1]).startswith(start) and process.environ().get(MARK) == mark
        return False

    while run.poll() is None:
        workers = [one for one in psutil.process_iter() if called(one, f"ray::{method.partition('.')[0]}")]
        for _ in range(500):  # about half a second: a dead one may have been replaced
            for worker in workers:
                if called(worker, f"ray::{method}"):
                    return worker
            time.sleep(0.001)
    raise AssertionError(run.communicate()[0])


def processes_of_runs(cluster: Cluster) -> list[str]:
    """Workers, drivers and what rewards are computed in, on all nodes."""
    of_a_run = re.compile(r"ray::.*(Worker|Supervisor)|.*(reward_worker\.py|minigpt train)")
    return [line for line in marked(cluster.mark) if of_a_run.match(line)]


def assert_nothing_is_left(cluster: Cluster) -> None:
    """Of a run: no process on any node, and nothing that is taken of them. The caller is a driver of the cluster."""
    assert wait_until(lambda: not processes_of_runs(cluster)), processes_of_runs(cluster)
    everything = taken_by_workers(ray.cluster_resources())
    assert wait_until(lambda: taken_by_workers(ray.available_resources()) == everything), ray.available_resources()


def taken_by_workers(resources: dict[str, float]) -> dict[str, float]:
    """Without the object store's memory, which Ray frees when it needs it."""
    return {name: amount for name, amount in resources.items() if name != "object_store_memory"}


@pytest.fixture(scope="module")
def killed(cluster, world) -> tuple[Path, str]:
    """A run on both nodes whose sampler, policy and driver were killed, each in the middle of what it does: its folder,
    and what it said."""
    folder = world / "spread"
    run = start(cluster, world, "spread", "--layout=apart.yaml", f"--ray_address={cluster.address}")
    wait_for_step(1, folder, run)
    worker_amid("RolloutWorker.generate", cluster.mark, run).kill()
    wait_for_step(2, folder, run)
    worker_amid("PolicyWorker.update", cluster.mark, run).kill()
    wait_for_step(3, folder, run)
    worker_amid("RolloutWorker.generate", cluster.mark, run)
    assert len(processes_of_runs(cluster)) >= 4, "driver, policy, sampler, rewards"
    run.kill()
    said, _ = run.communicate(timeout=60)
    return folder, said


def test_dead_workers_are_replaced_and_a_dead_driver_leaves_nothing_on_the_nodes(driver, cluster, killed):
    """Its workers are the nodes' children: they do not die with it as on a Ray of its own."""
    folder, said = killed
    assert_nothing_is_left(cluster)
    assert "rollout worker 0 died" in said
    assert "a new one answers the same prompts" in said
    assert re.search(r"policy worker 0 died.*; starting its group again from the last checkpoint", said), said
    assert re.search(r"resuming from .* at step \d+ of 10", said), said
    assert not (folder / "summary.json").exists()


def checkout_of_ours(folder: Path) -> Path:
    """A checkout of this repository's code that differs from what is installed here: what runs in a job can be told."""
    listed = ["git", "ls-files", "minigpt", "data_prep", "ds_configs"]
    for name in subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    with (folder / "minigpt" / "rl" / "run.py").open("a") as file:
        file.write("\nprint('the controller is', __file__, flush=True)\n")
    with (folder / "minigpt" / "rl" / "workers" / "policy.py").open("a") as file:  # of which summary.json tells
        file.write("\nPolicyWorker.describe = lambda self: {**TrainedWorker.describe(self), 'parameters': 4242}\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    return folder


def test_a_run_that_was_killed_and_one_that_is_stopped_go_on_to_the_same_bits(
    driver, cluster, world, killed, undisturbed, tmp_path
):
    """As jobs: controller and actors, on both nodes, are those of the checkout that was sent. The same bits also mean
    that no answer was sampled by stale weights."""
    (folder, _), code = killed, checkout_of_ours(tmp_path / "checkout")

    def submitted(*options: str) -> subprocess.Popen[str]:
        command = grpo(world, "spread", f"--layout={world / 'apart.yaml'}", *options)
        return cluster.submit("python", "-m", "minigpt", *command, working_dir=code)

    before = last_step(folder)
    run = submitted()
    bad = submitted("--minibatches=3")
    job = next(found[1] for line in run.stderr if (found := re.match(r"job (\S+) on ", line)))
    wait_for_step(before + 1, folder, run)
    assert submit(SubmitOptions(address=cluster.job_server, stop=job), []) == 143
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert f"at step {before} of 10" in said
    assert re.search(r"^stopped at step \d+; the same command goes on from here$", said, re.MULTILINE), said
    out, err = bad.communicate(timeout=180)
    assert bad.returncode == 1, out + err
    assert "error: 4 prompts x 4 samples do not divide into --minibatches 3" in out
    assert_nothing_is_left(cluster)
    before, run = last_step(folder), submitted()
    said, err = run.communicate(timeout=180)
    assert run.returncode == 0, said + err
    assert f"at step {before} of 10" in said
    ours, theirs = weights_of(folder), weights_of(undisturbed)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    (controller,) = re.findall(r"^the controller is (.*)$", said, re.MULTILINE)
    assert "working_dir_files" in controller
    assert controller.endswith("/minigpt/rl/run.py")
    assert json.loads((folder / "summary.json").read_text())["parameters"] == 4242
    kept = [path.name for path in (folder / "checkpoints").iterdir()]
    assert sorted(kept) == ["step_00000009", "step_00000010"]
    assert_nothing_is_left(cluster)


class Seen(NamedTuple):
    """A worker: its GPU, the one that its code is shown, and whether its weights are in memory."""

    gpu: tuple[str, str]  # node, number there
    visible: str
    awake: bool


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, list[Seen]]]:
    """The workers of a run of this process: when all models are loaded, and at every sampling."""
    found = []

    def look(worker: Any) -> tuple[tuple[str, str], str, bool]:
        context = ray.get_runtime_context()
        (gpu,) = context.get_accelerator_ids()["GPU"]
        awake = any(parameter.untyped_storage().nbytes() for parameter in worker.network.parameters())
        return (context.get_node_id(), gpu), os.environ["CUDA_VISIBLE_DEVICES"], awake

    def looking(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(roles: Roles, *arguments: Any) -> Any:
            result = method(roles, *arguments)
            looks = {r: [w.__ray_call__.remote(look) for w in group.workers] for r, group in roles.groups.items()}
            found.append({role: [Seen(*one) for one in ray.get(of_role)] for role, of_role in looks.items()})
            return result

        return call

    for name in ("setup", "sample"):
        monkeypatch.setattr(Roles, name, looking(getattr(Roles, name)))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the cluster's GPUs are not there; one that is would be found")
@pytest.mark.parametrize("layout", ["colocate", "split"])
def test_roles_get_the_gpus_of_the_named_layouts_and_those_that_share_one_take_turns(
    cluster, world, undisturbed, monkeypatch, seen, layout
):
    """Three GPUs on two nodes, as Ray was told; the models compute on the CPUs."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token_file))
    options = [f"--layout={layout}", f"--ray_address={cluster.address}", "--max_steps=2"]
    if layout == "split":  # policy and reference share two of them, beside samplers that never rest
        options += ["--overlap=1", "--kl_coefficient=0.01"]
    assert run_here(*grpo(world, layout, *options)) == 0
    gpus = {role: [one.gpu for one in workers] for role, workers in seen[0].items()}
    # Of the last worker: on a CPU numpy arrays of the first one's weights were handed on, and keep their memory
    awake = [{role: workers[-1].awake for role, workers in state.items()} for state in seen]
    assert all(one.visible == one.gpu[1] for state in seen for workers in state.values() for one in workers)
    assert all({role: [one.gpu for one in workers] for role, workers in state.items()} == gpus for state in seen)
    if layout == "colocate":
        assert gpus["rollout"] == gpus["policy"]
        assert awake[0] == {"policy": True, "rollout": False}
        assert awake[1:] == len(awake[1:]) * [{"policy": False, "rollout": True}]
    else:
        assert gpus["reference"] == gpus["policy"]
        assert awake == len(awake) * [{"policy": True, "reference": False, "rollout": True}]
    used = {gpu for of_role in gpus.values() for gpu in of_role}
    assert len(used) == 3
    assert len({node for node, _ in used}) == 2
    lines, expected = metrics_of(world / layout), metrics_of(undisturbed)
    assert all(line["seconds_turns"] > 0 for line in lines)
    assert [line["version_lag"] for line in lines] == ([0, 1] if layout == "split" else [0, 0])
    assert lines[0]["reward"] == expected[0]["reward"], "the same answers, by however many samplers"
    for name in ("loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(expected[0][name], rel=1e-3, abs=1e-6), name


def test_stop_ends_this_cluster_and_nothing_else_and_a_killed_driver_takes_its_ray_along(cluster, short_folder):
    mark = uuid.uuid4().hex
    bystander = start_driver(
        "Worker.remote().spin.remote()\nprint('up', flush=True)\nsys.stdin.readline()", short_folder, mark
    )
    job = cluster.submit("python", "-c", SLEEPER)
    try:
        assert bystander.stdout.readline() == "up\n"
        assert any(line == "running\n" for line in job.stdout)
        assert wait_until(lambda: "ray::Worker.spin" in " ".join(marked(mark)))
        stopped = cluster.run("ray_cluster.sh", "stop")
        assert stopped.returncode == 0
        assert stopped.stderr == "stopped 2 Ray node(s) on this machine\n"
        _, err = job.communicate(timeout=20)
        assert job.returncode == 1
        assert re.search("error: the connection to .* broke", err)
        assert wait_until(lambda: not marked(cluster.mark)), marked(cluster.mark)
        assert "ray::Worker.spin" in " ".join(marked(mark))
    finally:
        bystander.kill()
        bystander.communicate()
    assert wait_until(lambda: not marked(mark)), marked(mark)
