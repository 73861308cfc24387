"""Compiled code is kept where only its user can write; without such a place torch computes, and that is said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt
from minigpt.model.native import HEADERS

PROGRAM = """
import os, pwd, sys
if "HOME" not in os.environ:
    def nobody(uid):
        raise KeyError(uid)
    pwd.getpwuid = nobody  # as in a container that runs as a user it does not know
from minigpt.model.native import load_native
import minigpt.model.native
folder = os.path.dirname(minigpt.model.native.__file__)
from pathlib import Path
for name in ("cross_entropy.cpp", "attention.cpp"):
    print(load_native(Path(folder, name)) is not None)
"""


def loaded(environment: dict[str, str | None], program: str = PROGRAM) -> tuple[list[str], str]:
    """Whether each of two files was loaded, and what stderr says."""
    changed = {**os.environ, "XDG_CACHE_HOME": None, **environment}
    variables = {key: value for key, value in changed.items() if value is not None}
    run = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split(), run.stderr


@pytest.mark.parametrize("home", [None, "/dev/null"], ids=["without HOME", "HOME that cannot be written"])
def test_without_a_home_it_is_kept_in_a_private_temporary_folder(home, tmp_path):
    assert loaded({"HOME": home, "TMPDIR": str(tmp_path)}) == (["True", "True"], "")
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"minigpt-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert len(before) == 2
    assert loaded({"HOME": home, "TMPDIR": str(tmp_path)}) == (["True", "True"], "")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.so")} == before, "compiled once"


@pytest.mark.parametrize("trap", ["open to all", "a link", "a file"])
def test_a_temporary_folder_that_others_can_write_to_is_not_loaded_from(trap, tmp_path):
    folder, elsewhere = tmp_path / f"minigpt-{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if trap == "a link":
        folder.symlink_to(elsewhere)
    elif trap == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    found, said = loaded({"HOME": "/dev/null", "TMPDIR": str(tmp_path)})
    assert found == ["False", "False"]
    assert len(said.splitlines()) == 1
    assert said.startswith("note: code for this CPU could not be compiled (there is no folder to keep it in)")
    assert not list(tmp_path.rglob("*.so"))


def test_the_name_of_a_library_depends_on_all_that_its_source_includes():
    files = [path for path in Path(minigpt.__file__).parent.rglob("*") if path.suffix in (".cpp", ".h")]
    found = {
        (path.parent / name).resolve() for path in files for name in re.findall(r'#include "(.+)"', path.read_text())
    }
    assert len(found) == 2
    assert found == {path.resolve() for path in HEADERS}


def broken_compiler(folder: Path) -> str:
    compiler = folder / "compiler"
    compiler.write_text("#!/bin/sh\necho 'unrecognized option' >&2\necho 'fatal error: no OpenMP here' >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


def test_a_compiler_that_fails_is_quoted_once_and_no_compiler_is_nothing_to_talk_about(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": broken_compiler(tmp_path)}
    found, said = loaded(environment)
    assert found == ["False", "False"]
    assert len(said.splitlines()) == 1
    assert f"({tmp_path}/compiler: fatal error: no OpenMP here)" in said
    for quiet in ({"CXX": "no-such-compiler"}, {"MINIGPT_NATIVE": "0"}):
        assert loaded({**environment, **quiet}) == (["False", "False"], "")


def test_doctor_says_what_the_loader_says(tmp_path):
    command = [sys.executable, "-m", "minigpt.cli", "doctor"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    good = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    assert "could not be compiled" not in good.stdout
    assert len(list((tmp_path / "cache").rglob("*.so"))) == 3, "attention, the loss, decoding"
    (tmp_path / f"minigpt-{os.getuid()}").write_text("in the way")
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path), "COLUMNS": "200"}
    environment.pop("XDG_CACHE_HOME", None)
    bad = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "CPU code" in bad.stdout
    assert "could not be compiled: there is no folder to keep it in" in bad.stdout
    assert "Set XDG_CACHE_HOME to a folder" in bad.stdout


@pytest.mark.parametrize(
    ("variable", "reason"),
    [({"CXX": "no-such-compiler"}, "there is no no-such-compiler"), ({"MINIGPT_NATIVE": "0"}, "MINIGPT_NATIVE=0")],
)
def test_doctor_says_why_nothing_is_compiled(variable, reason, tmp_path):
    environment = {**os.environ, **variable, "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "minigpt.cli", "doctor"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, "it is slower, but it works"
    assert re.search(rf"warning +CPU code +could not be compiled: {re.escape(reason)}", found.stdout)
    assert not list(tmp_path.rglob("*.so"))


def test_the_dataset_opens_without_a_home(tmp_path):
    program = (
        PROGRAM.partition("from minigpt")[0]
        + """
from minigpt.dataset.shards import _VerifiedFiles
_VerifiedFiles().remember(os.stat("/dev/null"), "0" * 64)
print("opened")
"""
    )
    assert loaded({"HOME": None, "TMPDIR": str(tmp_path)}, program) == (["opened"], "")
