"""Which role runs where: layouts as data.

A layout says for each role how many workers it has and what each of them needs. Roles that share a device name each
other (`beside`); their shares of a GPU are fractions. The same loop runs on a laptop without a GPU, with all models on
one GPU, or with each role on GPUs of its own on several nodes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from minigpt.errors import UserError

ROLES = ("policy", "critic", "reference", "reward", "rollout")
ENGINES = ("policy", "critic")  # their workers are ranks of one DeepSpeed engine
NAMED = ("laptop", "colocate", "split")


@dataclass(frozen=True)
class Role:
    """What the workers of a role need.

    Attributes:
        workers: How many there are. Those of the policy and of the critic are ranks of one DeepSpeed engine.
        gpus: Of each worker; a fraction when it shares one.
        cpus: Of each worker, as Ray counts them (they are reserved, not enforced).
        threads: CPU threads that each worker computes with; 0: all cores of its node.
        beside: The role on whose worker of the same number's device this one's runs.
    """

    workers: int = 1
    gpus: float = 0.0
    cpus: float = 0.1
    threads: int = 0
    beside: str | None = None


Layout = dict[str, Role]


def laptop() -> Layout:
    """Everything on the CPUs of one machine, taking turns."""
    return {role: Role() for role in ROLES}


def colocate(gpus: int) -> Layout:
    """A worker of every role on each GPU, taking turns: together they reserve one CPU, which every machine has."""
    share = 1 / len(ROLES)
    return {role: Role(gpus, share, share, beside=None if role == "policy" else "policy") for role in ROLES}


def split(gpus: int) -> Layout:
    """Half of the GPUs sample, the others train; reference, critic and reward models sit beside the policy."""
    sampling = max(1, gpus // 2)
    training = max(1, gpus - sampling)
    beside = {role: Role(training, 0.25, 0.25, beside="policy") for role in ("critic", "reference", "reward")}
    return {"policy": Role(training, 0.25, 0.25), **beside, "rollout": Role(sampling, 1.0, 1.0)}


def choose_layout(name: str, gpus: int) -> Layout:
    """A named layout for so many GPUs, or the one in a YAML file.

    Args:
        name: auto, laptop, colocate, split, or the path of a YAML file: a mapping from role to the fields of `Role`;
            roles that are left out are as in `laptop`.
        gpus: Of the whole cluster.

    Errors: UserError for unknown names, roles and fields, and for counts that cannot be.
    """
    if name == "auto":
        name = "laptop" if gpus == 0 else "colocate" if gpus == 1 else "split"
    if name == "laptop":
        return laptop()
    if name in ("colocate", "split"):
        if gpus < (2 if name == "split" else 1):
            raise UserError(
                f"--layout {name} needs {'two GPUs' if name == 'split' else 'a GPU'}, the cluster has {gpus}"
            )
        return colocate(gpus) if name == "colocate" else split(gpus)
    return _read(Path(name))


def _read(path: Path) -> Layout:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--layout {path} is neither a file nor one of {', '.join(('auto', *NAMED))}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--layout {path} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no layout: it must name roles ({', '.join(ROLES)})")
    layout = laptop()
    fields = {field.name for field in dataclasses.fields(Role)}
    for role, values in content.items():
        if role not in ROLES:
            raise UserError(f"{path}: there is no role {role!r}; the roles are {', '.join(ROLES)}")
        values = {} if values is None else values
        unknown = [name for name in values if name not in fields] if isinstance(values, dict) else [values]
        if unknown:
            raise UserError(f"{path}: {role} takes {', '.join(sorted(fields))}, not {unknown[0]!r}")
        for name, value in values.items():
            if (rule := _broken_rule(name, value)) is not None:
                raise UserError(f"{path}: {name} of {role} is {value!r}, it must be {rule}")
        layout[role] = Role(**values)
    for role, needs in layout.items():
        host = layout.get(needs.beside) if needs.beside else None
        if needs.beside and (host is None or host.beside or host.workers < needs.workers):
            raise UserError(
                f"{path}: {role} is to run beside {needs.beside}, which must be a role with at least as many workers "
                "and a place of its own"
            )
    return layout


def _broken_rule(name: str, value: Any) -> str | None:
    """What the value of a field of `Role` should be and is not."""
    if name == "beside":
        return None if value is None or isinstance(value, str) else "the name of a role"
    whole = name in ("workers", "threads")
    least = 1 if name == "workers" else 0
    number = isinstance(value, int) if whole else isinstance(value, int | float)
    if not number or isinstance(value, bool) or not math.isfinite(value) or value < least:
        return f"a {'whole ' * whole}number of at least {least}"
    return "a part of one GPU, or a whole number" if name == "gpus" and value > 1 and value != int(value) else None


def sharing(layout: Layout, roles: list[str], sleep: bool | None) -> dict[str, set[str]]:
    """For each role the others that give way to it, because they are on its device and it works.

    Args:
        layout, roles: Those of the run.
        sleep: None: roles on shared GPUs take turns; true: also those on CPUs, all of which share one memory; false:
            nobody.
    """
    place = {role: layout[role].beside or role if layout[role].gpus else "cpu" for role in roles}
    if sleep is None:
        place = {role: name for role, name in place.items() if name != "cpu"}
    elif not sleep:
        place = {}
    return {role: {other for other, there in place.items() if there == name} - {role} for role, name in place.items()}


@dataclass(frozen=True)
class Bundle:
    """Resources on one node, and the workers (role, rank) that share them."""

    resources: dict[str, float]
    workers: list[tuple[str, int]]

    @property
    def roles(self) -> str:
        """In words, for messages."""
        return " + ".join(dict.fromkeys(role for role, _ in self.workers))


def bundles(layout: Layout, roles: list[str]) -> list[Bundle]:
    """The bundles of a placement group for the roles that a run has.

    The share of a GPU of a role that the run does not have stays with those that it was to sit beside: two ranks of an
    engine, each with less than half a GPU, would be put on the same one.

    Errors: UserError for ranks that could come to lie on one GPU also with it.
    """
    placed: dict[tuple[str, int], Bundle] = {}
    found: list[Bundle] = []
    for role in sorted(roles, key=lambda name: layout[name].beside is not None):
        needs = layout[role]
        for rank in range(needs.workers):
            bundle = placed.get((needs.beside or "", rank))
            if bundle is None:
                bundle = Bundle({}, [])
                found.append(bundle)
            for resource, amount in (("CPU", needs.cpus), ("GPU", needs.gpus)):
                if amount:
                    bundle.resources[resource] = round(bundle.resources.get(resource, 0.0) + amount, 6)
            bundle.workers.append((role, rank))
            placed[role, rank] = bundle
    for role in set(ROLES) - set(roles):
        for rank in range(layout[role].workers if layout[role].gpus else 0):
            if (bundle := placed.get((layout[role].beside or "", rank))) is not None:
                bundle.resources["GPU"] = round(bundle.resources.get("GPU", 0.0) + layout[role].gpus, 6)
    for bundle in found:
        bundle.resources.setdefault("CPU", 0.01)  # an empty bundle cannot be placed
    for engine in ENGINES:
        shares = [b.resources.get("GPU", 0.0) for b in found for role, _ in b.workers if role == engine]
        _keep_ranks_apart(engine, shares)
    return found


def _keep_ranks_apart(engine: str, shares: list[float]) -> None:
    """Ray puts what fits on one GPU, and NCCL would refuse two ranks there long after the start."""
    one, other, *_ = [*sorted(share for share in shares if share > 0), math.inf, math.inf]
    if one + other <= 1:
        raise UserError(
            f"two of the {len(shares)} ranks of {engine} could come to lie on one GPU, which NCCL refuses, since they "
            f"have {one:g} and {other:g} of one: give each more than half, together with what runs beside it"
        )


def strangers(needed: list[Bundle]) -> tuple[str, str] | None:
    """Roles of two bundles that fit on one GPU: there they would not give way to each other, as `sharing` knows only of
    those that are beside each other."""
    parts = [bundle for bundle in needed if 0 < bundle.resources.get("GPU", 0.0) < 1]
    for one, other in combinations(parts, 2):
        if one.roles != other.roles and one.resources["GPU"] + other.resources["GPU"] <= 1:
            return one.roles, other.roles
    return None
