"""The driver's side of Ray: join a cluster or start a private one, compare a layout with it, leave nothing behind.

`connect` is called once, before the first actor. With an address (given, or in RAY_ADDRESS, which Ray sets in
submitted jobs) it joins that cluster; otherwise it starts a Ray of its own on this machine. Both use Ray's token
authentication, because Ray runs the code of anybody who reaches its ports.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import psutil
import ray
from ray._private.state import available_resources_per_node
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

from minigpt.errors import UserError

TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
SUBMITTED = "MINIGPT_SUBMITTED"  # set in jobs whose working directory is thrown away
REMEDY = "use fewer or smaller roles, or add a node with ./launch/ray_cluster.sh join"
EPSILON = 1e-6  # Ray counts in steps of 1e-4
_before: dict[str, str | None] = {}  # what TOKEN_VARIABLES held before `connect`
_guard: subprocess.Popen[bytes] | None = None  # outlives a killed driver, and ends what Ray would leave behind


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster at `address`, or start a private Ray on this machine.

    Ray gives an actor OMP_NUM_THREADS = its num_cpus unless the variable is set already, and so does a launcher's
    OMP_NUM_THREADS=1 reach every actor: actors that compute call `torch.set_num_threads`, which wins over both.

    Args:
        address: `host:port` of the head node, or `auto` on a node of the cluster. None: RAY_ADDRESS, which Ray sets in
            submitted jobs; without it, a Ray of our own: token known to this process's children only, no dashboard,
            gone when this process is, also by SIGKILL. Call it from a thread that lives as long as the run: the kernel
            ends Ray with the thread that started it.
        num_cpus: CPUs that a Ray of our own hands out; None: all cores. A cluster has its own count.

    Raises:
        UserError: The cluster does not answer, refuses the token, or runs other versions.
    """
    if ray.is_initialized():
        raise RuntimeError("connect() was called twice; disconnect() comes between")
    address = address or os.environ.get("RAY_ADDRESS")
    _before.update({name: os.environ.get(name) for name in TOKEN_VARIABLES})
    try:
        with _our_signal_handlers():
            if address is None or address == "local":
                _start_private(num_cpus)
            else:
                _join(address)
    except BaseException:
        disconnect()
        raise


def disconnect() -> None:
    """Leave the cluster; end a Ray that `connect` started, and wait until its processes are gone."""
    global _guard
    if _guard is not None:
        _guard.kill()
        _guard.communicate()
        _guard = None
    ray.shutdown(wait_for_processes=True)
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _start_private(num_cpus: int | None) -> None:
    # In the environment, Ray's processes inherit the token and no other user can read it.
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    use_token()
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )
    _start_guard()


def _start_guard() -> None:
    """When a driver is killed, the kernel kills Ray's servers and the actors follow; the servers' two agents would live
    on for a minute or two, reporting to servers that are gone. A shell waits for the end of a pipe and kills them."""
    global _guard
    servers = [child for child in psutil.Process().children() if child.name() == "raylet"]
    agents = [str(agent.pid) for server in servers for agent in server.children()]
    command = ["sh", "-c", 'read -r _; kill -KILL "$@" 2>/dev/null', "ray-guard", *agents]
    _guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _join(address: str) -> None:
    use_token()
    if address != "auto":
        probe(address)
    try:
        ray.init(address, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(f"no connection to the Ray cluster at {address}: {error}") from error


def probe(address: str) -> None:
    """Ask the head at `address` (host:port) who it is. Ray itself tries for 20 to 60 seconds before it gives up.

    Raises:
        UserError: Nobody answers, or the token is refused.
    """
    if not re.fullmatch(r"[^/]+:\d+", address):
        raise UserError(
            f"{address} is not the address of a head node: write host:port, and run this on a node of the cluster; "
            "from elsewhere, ./launch/ray_submit.sh takes the address of the job server"
        )
    try:
        token = AuthenticationTokenLoader.instance().get_token_for_http_header()
        with grpc.insecure_channel(address) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            ask(b"", metadata=list(token.items()), timeout=5)
    except ray.exceptions.AuthenticationError as error:  # a token file that is not there
        raise UserError(wrong_token(address)) from error
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(wrong_token(address)) from error
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise UserError(
                f"no Ray cluster answers at {address}: is its head up (./launch/ray_cluster.sh head), "
                "and its port open to this machine?"
            ) from error


def wrong_token(address: str) -> str:
    return (
        f"this machine has no token for {address}, or one that is refused there: copy ~/.ray/auth_token from the head, "
        "or set RAY_AUTH_TOKEN_PATH to the copy's place"
    )


def use_token() -> None:
    """Switch token authentication on. Ray read the environment when it was imported, and looks again only if told."""
    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _our_signal_handlers() -> Iterator[None]:
    """Keep a handler of SIGTERM, such as one that saves a checkpoint: `ray.init` puts its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before not in (signal.SIG_DFL, None):
            signal.signal(signal.SIGTERM, before)


@dataclass
class _Node:
    """What a node has left: GPUs one by one, since a fraction of a GPU must lie on one of them."""

    name: str
    free: dict[str, float]
    gpus: list[float] = field(init=False)

    def __post_init__(self) -> None:
        whole, part = divmod(self.free.get("GPU", 0.0), 1.0)
        self.gpus = [1.0] * int(whole) + [part] * (part > 0)

    def take(self, bundle: Mapping[str, float]) -> bool:
        """Take the bundle's share if it fits."""
        gpus = self._chosen_gpus(bundle.get("GPU", 0.0))
        if gpus is None or any(self.free.get(name, 0.0) < need - EPSILON for name, need in bundle.items()):
            return False
        for gpu in gpus:
            self.gpus[gpu] -= min(bundle["GPU"], 1.0)
        for name, need in bundle.items():
            self.free[name] = self.free.get(name, 0.0) - need
        return True

    def _chosen_gpus(self, need: float) -> list[int] | None:
        """Indices of whole free GPUs, or of the fullest one that still has room for a fraction."""
        if need == 0:
            return []
        fitting = [i for i, free in enumerate(self.gpus) if free >= min(need, 1.0) - EPSILON]
        count = math.ceil(need)
        return sorted(fitting, key=self.gpus.__getitem__)[:count] if len(fitting) >= count else None


def check_resources(bundles: Sequence[Mapping[str, float]], roles: Sequence[str], patience_s: float = 10.0) -> None:
    """Compare what a layout needs with the cluster, since Ray waits without a word for what can never come.

    A bundle lies on one node. As in Ray, those with the most GPUs choose first, each the node with the least left.

    Args:
        bundles: One for each actor (or group of actors that stays together), such as `{"CPU": 1, "GPU": 1}`.
        roles: The role of each bundle, for the message.
        patience_s: Seconds to wait until the resources that others hold are free.

    Raises:
        UserError: One sentence about what is missing, or in use.
    """
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}

    def nodes(resources: Mapping[str, Mapping[str, float]]) -> list[_Node]:
        return [_Node(alive[key]["NodeManagerHostname"], dict(resources[key])) for key in alive if key in resources]

    total = nodes({key: node["Resources"] for key, node in alive.items()})
    for resource in sorted({name for bundle in bundles for name in bundle}, reverse=True):
        _check_sum(resource, bundles, roles, total)
    overview = _described(total, bundles)
    homeless = _place(bundles, total)
    if homeless is not None:
        raise UserError(
            f"{roles[homeless]} needs {_listed(bundles[homeless])} on one node, and beside the other roles "
            f"no node has that ({overview}): {REMEDY}"
        )
    deadline = time.monotonic() + patience_s
    while (homeless := _place(bundles, nodes(available_resources_per_node()))) is not None:
        if time.monotonic() > deadline:
            free = _described(nodes(available_resources_per_node()), bundles)
            raise UserError(
                f"{roles[homeless]} needs {_listed(bundles[homeless])} on one node, and other jobs use "
                f"what the cluster has (free now: {free}): wait until they end; `ray job list` names them"
            )
        time.sleep(0.2)


def _check_sum(
    resource: str, bundles: Sequence[Mapping[str, float]], roles: Sequence[str], nodes: Sequence[_Node]
) -> None:
    need: dict[str, float] = {}
    for role, bundle in zip(roles, bundles, strict=True):
        if bundle.get(resource):
            need[role] = need.get(role, 0.0) + bundle[resource]
    have = sum(node.free.get(resource, 0.0) for node in nodes)
    if sum(need.values()) > have + EPSILON:
        raise UserError(
            f"the layout needs {_amount(sum(need.values()), resource)} "
            f"({', '.join(f'{role} {amount:g}' for role, amount in need.items())}) and the cluster has {have:g} "
            f"({', '.join(f'{node.name}: {node.free.get(resource, 0.0):g}' for node in nodes)}): {REMEDY}"
        )


def _place(bundles: Sequence[Mapping[str, float]], nodes: Sequence[_Node]) -> int | None:
    """Place all bundles on the nodes, which lose what they give. Returns the first bundle that found no place."""

    def size(index: int) -> tuple[float, float]:
        return bundles[index].get("GPU", 0.0), bundles[index].get("CPU", 0.0)

    for index in sorted(range(len(bundles)), key=size, reverse=True):
        tightest = sorted(nodes, key=lambda node: (node.free.get("GPU", 0.0), node.free.get("CPU", 0.0)))
        if not any(node.take(bundles[index]) for node in tightest):
            return index
    return None


def _amount(value: float, resource: str) -> str:
    plural = "s" if resource in ("CPU", "GPU") and value != 1 else ""
    return f"{value:g} {resource}{plural}"


def _listed(bundle: Mapping[str, float]) -> str:
    return " and ".join(_amount(value, name) for name, value in sorted(bundle.items(), reverse=True) if value)


def _described(nodes: Sequence[_Node], bundles: Sequence[Mapping[str, float]]) -> str:
    """`host: 2 GPUs and 8 CPUs, …`, of the resources that the bundles ask for."""
    asked = {name for bundle in bundles for name in bundle}
    return ", ".join(
        f"{node.name}: {_listed({name: node.free.get(name, 0.0) for name in asked}) or 'nothing'}" for node in nodes
    )


if __name__ == "__main__":  # `launch/ray_cluster.sh join` asks before it starts anything
    try:
        probe(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
