"""Renders chat templates that came with somebody else's model, in a process of its own.

A template is a program. Jinja's sandbox keeps it away from Python's internals, but not from loops without end or from
filling the memory. So `chat_template.py` runs this file as a script: one that may neither open files nor start
processes, whose memory is limited, and whose every rendering has limits of processor time and of output.

One JSON object a line comes in, one goes out. The first names the template, `{"template", "variables", "nonce",
"seconds", "characters"}`, and is answered by `{"names"}`, the variables that the template looks at, or `{"error"}`;
each later one is `{"calls": [variables, ...]}`, answered by `{"results": [{"text"} or {"error"}, ...]}`. When the time
is over, the kernel ends the process.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEMORY = 1 << 30
"""Bytes of address space; Python and Jinja take about a twentieth of it."""
WARM_UP = r"{% for m in messages %}{{ '\n' + m | tojson | trim }}{% endfor %}{{ raise_exception('é') }}"
"""Uses what Jinja and Python import late, since afterwards no file can be opened."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says; it is rendered as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore, which lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"the name {name!r} is not allowed")


def raise_exception(message: Any) -> NoReturn:
    """How a template says that it does not take a conversation."""
    raise jinja2.TemplateError(str(message))


def json_filter(nonce: str) -> Callable[..., str]:
    """transformers' `tojson`, which also notes in each placeholder that its text has to be written as JSON."""
    mark = re.compile(rf"({nonce}\d+[ja]*)\.")

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return mark.sub(rf"\g<1>{'a' if ensure_ascii else 'j'}.", text)

    return tojson


def compile_template(source: str, nonce: str) -> jinja2.Template:
    """The template in a sandbox with the filters and functions that transformers offers.

    There is no `strftime_now`: a template would render another text every day, and packing is to give the same bytes.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = json_filter(nonce)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = PlainNamespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], characters: int) -> dict[str, str]:
    """`{"text"}`, or `{"error"}` with what is wrong."""
    parts, length = [], 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            if length > characters:
                return {"error": f"it writes more than {characters:,} characters"}
    except MemoryError:
        return {"error": "it needs more memory than a chat template is given"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # a template is a program: anything can go wrong in it
        return {"error": " ".join((str(error) or type(error).__name__).split())}
    return {"text": "".join(parts)}


def main() -> None:
    """Answers requests until the input ends."""
    setup = json.loads(sys.stdin.readline())
    render(compile_template(WARM_UP, setup["nonce"]), {"messages": ["é"]}, 100)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    seconds = setup["seconds"]
    signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time: a paused or crowded machine is no reason to stop
    try:
        template = compile_template(setup["template"], setup["nonce"])
        names = jinja2.meta.find_undeclared_variables(template.environment.parse(setup["template"]))
    except Exception as error:  # broken syntax, or nested so deeply that the compiler gives up
        _answer({"error": " ".join((str(error) or type(error).__name__).split())})
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    _answer({"names": sorted(names)})
    for line in sys.stdin:
        results = []
        for call in json.loads(line)["calls"]:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            results.append(render(template, {**setup["variables"], **call}, setup["characters"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer({"results": results})


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
