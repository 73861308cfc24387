"""How long `minigpt --help` takes, next to a Python that does nothing.

    python benchmarks/startup.py [--rounds 15] [--json FILE] [--markdown FILE]

Fresh processes, alternating. With --imports: the slowest imports, to see what must wait until it is needed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time

from common import output_arguments, publish, spread

TARGET_SECONDS = 0.5
HELP = [sys.executable, "-m", "minigpt.cli", "--help"]
NOTHING = [sys.executable, "-c", "pass"]


def main() -> None:
    arguments = _arguments()
    rounds = 3 if arguments.smoke else arguments.rounds
    times: dict[str, list[float]] = {"minigpt --help": [], "python -c pass": []}
    for _ in range(rounds):
        times["minigpt --help"].append(seconds(HELP))
        times["python -c pass"].append(seconds(NOTHING))
    summary = {name: spread(values) for name, values in times.items()}
    lines = ["| | seconds: median (min to max) |", "|---|---:|"]
    lines += [f"| {n} | {s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f}) |" for n, s in summary.items()]
    table = "\n".join([*lines, "", f"Wanted: at most {TARGET_SECONDS} s."])
    publish("Start-up", {"seconds": times}, table, arguments.json, arguments.markdown)
    if arguments.imports:
        print("\n".join(slowest_imports()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--imports", action="store_true", help="also list the slowest imports")
    output_arguments(parser)
    return parser.parse_args()


def seconds(command: list[str]) -> float:
    """How long a command takes; it must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def slowest_imports(count: int = 15) -> list[str]:
    """The modules with the largest cumulative import times, as Python reports them."""
    command = [HELP[0], "-X", "importtime", *HELP[1:]]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s*(\S+)$", report, re.MULTILINE)
    slowest = sorted(((int(microseconds), module) for microseconds, module in found), reverse=True)
    return [f"{microseconds / 1000:8.1f} ms  {module}" for microseconds, module in slowest[:count]]


if __name__ == "__main__":
    main()
