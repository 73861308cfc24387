"""The process that reward functions run in. `reward_pool.py` starts this file as a script, and ends it.

A reward function is somebody's code that reads what a model wrote: it can hang, eat the memory, crash or call `exit`.
So it happens here, in a small process of its own: no fork of one that has torch and threads in it, and none of
`multiprocessing`'s, which imports the main program (with torch) again. The kernel holds the memory limit and ends this
process when the one that started it dies, however it dies; the time limit is held by the pool.

The pool sends pickles: first the set-up, then (items, first call), a batch each. JSON comes back, because nothing that
user code may have written to should be unpickled: after the set-up {"names", "weights"} or {"error"}; after a batch
`{}` at its arrival, then one line for every call, in order: {"reward", "metrics"} or {"error"}.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

OUT_OF_MEMORY = 77  # exit status
MAX_REWARD = 1e9  # beyond it a reward is a mistake; sums of these times weights stay finite in float32
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answers batches until the pool hangs up. Arguments: file descriptor of the connection, process id of the pool."""
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    # Who stops a job tells all its processes. The run finishes its step first, for which it needs these rewards.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the line above
    setup = connection.recv()
    sys.path[:] = setup["sys_path"]
    for kind, limit in ((resource.RLIMIT_AS, setup["memory_mb"] << 20), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    try:
        serve(connection, setup["specs"])
    except EOFError:
        pass  # the pool closed the connection
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def serve(connection: Connection, specs: list[str]) -> None:
    """Import the rewards and score batches with them."""
    from minigpt.errors import UserError
    from minigpt.rl.rewards import describe, parse_rewards

    def send(reply: dict[str, Any]) -> None:
        connection.send_bytes(json.dumps(reply).encode())

    try:
        rewards = parse_rewards(specs)
    except UserError as error:
        send({"error": str(error)})
        return
    send({"names": [r.name for r in rewards], "weights": [r.weight for r in rewards]})
    while True:
        items, first_call = connection.recv()
        send({})
        for call in range(first_call, len(items) * len(rewards)):
            item, index = divmod(call, len(rewards))
            prompt, completion, reference = items[item]
            try:
                reply = read_result(rewards[index].function(prompt, completion, dict(reference)))
            except MemoryError:
                raise  # what filled the memory may still be in it: end here, and the pool starts another process
            except BaseException as error:
                reply = {"error": f"raised {describe(error)}"}
            send(reply)


def read_result(result: Any) -> dict[str, Any]:
    """What a reward function returned as {"reward", "metrics"}, or {"error"} when it is not as agreed."""
    values = result if isinstance(result, Mapping) else {"reward": result}
    numbers = {}
    for key, value in values.items():
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            return {"error": f"returned {type(value).__name__} instead of a number"}
        numbers[str(key)] = float(value)
    reward = numbers.pop("reward") if "reward" in numbers else sum(numbers.values())
    if not abs(reward) <= MAX_REWARD:
        return {"error": f"returned {reward}, which is no number up to {MAX_REWARD:.0e}"}
    return {"reward": reward, "metrics": numbers}


if __name__ == "__main__":
    main()
