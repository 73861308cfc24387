"""The scripts in `launch/`: what they say on machines that lack something, that a second run does nothing again, and
that `train.sh` really trains with the deepspeed launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((REPOSITORY / "launch").glob("*.sh")), REPOSITORY / ".ci" / "run"]
BASIC = ("bash", "env", "dirname", "cat", "cut", "sha256sum", "rm", "flock")  # what a bare Linux has of what we use
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A fresh copy of the repository, as far as setting up looks at it."""
    folder = tmp_path / "check out"  # with a space, as people's folders have
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    (folder / "tests" / "serve").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "tests/serve/chromium.py"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture
def bare_machine(tmp_path) -> Path:
    """A PATH with the basic tools only: no Python, no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in BASIC:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def run(command: list, path: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of this process's environment but what is given."""
    environment = {"PATH": str(path), "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def in_setup(checkout: Path, commands: str, path: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands after sourcing _setup.sh."""
    script = f"source '{checkout}/launch/_setup.sh'; {commands}"
    return run([shutil.which("bash"), "-c", script], path, **environment)


def make_ready(checkout: Path) -> None:
    """An environment that counts as set up: a real one without packages of its own, and the stamp."""
    packages = "--system-site-packages"
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", packages, checkout / ".venv"], check=True)
    stamped = in_setup(checkout, 'wanted_stamp >"$STAMP"', os.environ["PATH"])
    assert stamped.returncode == 0, stamped.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_and_can_be_run(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK) or script.name.startswith("_")


@pytest.mark.parametrize("script", ["launch/quickstart.sh", "launch/test.sh", ".ci/run"])
def test_without_python_a_sentence_says_which_is_needed(script, checkout, bare_machine):
    done = run([checkout / script], bare_machine)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "Python 3.11 or newer is needed and python3 is not installed" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_interpreter_is_found_under_a_path_with_a_space(checkout, bare_machine, tmp_path):
    python = tmp_path / "my python" / "python3"
    python.parent.mkdir()
    python.symlink_to(BASE_PYTHON)
    found = in_setup(checkout, "find_python", bare_machine, PYTHON=str(python))
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(python)


def test_without_a_compiler_a_sentence_says_how_to_get_one(checkout, bare_machine):
    (bare_machine / "python3").symlink_to(BASE_PYTHON)
    done = run([checkout / "launch" / "quickstart.sh"], bare_machine)
    assert done.returncode == 1
    assert re.search(r"error: g\+\+ is missing.*apt-get install g\+\+", done.stderr)
    assert not (checkout / ".venv").exists()


def test_when_pip_fails_its_reason_and_ours_are_shown_and_the_next_run_tries_again(checkout):
    nothing = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": str(BASE_PYTHON)}
    for _ in range(2):
        done = in_setup(checkout, "check_compiler() { :; }; ensure_environment", os.environ["PATH"], **nothing)
        assert done.returncode == 1
        assert "ERROR: Cannot install setuptools" in done.stderr
        assert "error: pip could not install setuptools" in done.stderr
        assert not (checkout / ".venv" / "minigpt-setup").exists()


OPERATORS_OF_DEEPSPEED = """
import torch
from torch.utils import cpp_extension
torch.cuda.is_available, torch.version.cuda, cpp_extension.CUDA_HOME = (lambda: True), "13.0", None
torch.cuda.get_device_properties = lambda device: type("GPU", (), {"major": 9, "minor": 0})
from deepspeed.ops.op_builder.all_ops import ALL_OPS
print([builder.is_compatible() for builder in ALL_OPS.values()])
"""


def test_deepspeed_is_installed_beside_a_gpu_without_nvcc():
    """Its setup.py asks every operator whether it could be built, and some look for nvcc; not with our variables."""
    script = (REPOSITORY / "launch" / "_setup.sh").read_text()
    (given,) = re.findall(r"^ +((?:DS_\w+=\d )+)install .*--no-build-isolation", script, re.MULTILINE)
    ours = {"DS_ACCELERATOR": "cuda", **dict(pair.split("=") for pair in given.split())}
    done = run([sys.executable, "-c", OPERATORS_OF_DEEPSPEED], os.environ["PATH"], **ours)
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout


def test_a_second_run_installs_nothing_until_the_pins_change(checkout, bare_machine):
    make_ready(checkout)
    ready = in_setup(checkout, "ensure_environment; command -v python", bare_machine)  # cannot install: no Python there
    assert ready.returncode == 0, ready.stderr
    assert ready.stdout.strip() == str(checkout / ".venv" / "bin" / "python")
    assert not ready.stderr
    with (checkout / "constraints.txt").open("a") as pins:
        pins.write("another-package==1.0\n")
    assert in_setup(checkout, "ensure_environment", bare_machine).returncode == 1


def test_test_sh_runs_every_check_and_one_failure_fails_all(checkout):
    make_ready(checkout)
    for package in ("minigpt", "data_prep"):
        (checkout / package).mkdir()
    (checkout / "minigpt" / "__init__.py").write_text('"""Fine."""\n')
    (checkout / "data_prep" / "__init__.py").write_text("import os\n")  # unused: the linter minds
    (checkout / "tests" / "test_fine.py").write_text("def test_fine():\n    assert True\n")
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run([checkout / "launch" / "test.sh", "-q"], tools, MYPY_CACHE_DIR=str(checkout / ".mypy_cache"))
    summary = re.search(r"== summary: (.*) ==", done.stdout)
    assert summary, done.stdout + done.stderr
    assert summary[1] == "ruff check FAILED · ruff format ok · mypy ok · pytest ok"
    assert done.returncode == 1
    assert "1 passed" in done.stdout
    (checkout / "data_prep" / "__init__.py").write_text("")
    done = run([checkout / "launch" / "test.sh", "-q"], tools)
    assert done.returncode == 0, done.stdout + done.stderr


def test_test_sh_without_a_browser_says_how_to_get_one_before_anything_is_tested(checkout, bare_machine):
    make_ready(checkout)
    (bare_machine / "id").write_text("#!/bin/sh\necho 1000\n")  # nobody who could install it
    (bare_machine / "id").chmod(0o755)
    packages = sysconfig.get_paths()["purelib"]  # of the environment of these tests: playwright
    done = run([checkout / "launch" / "test.sh"], bare_machine, PYTHONPATH=packages, PLAYWRIGHT_BROWSERS_PATH="/none")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the tests of the chat page need Chromium")
    assert "apt-get install chromium" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    assert len(pins) == len([line for line in lines if "==" in line])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name != "minigpt":
            assert pins[requirement.name.lower()] in requirement.specifier, requirement
    assert pins["torch"] == pins["torch"].partition("+")[0], "a build suffix would not install on a GPU machine"


def train_sh(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """launch/train.sh without an active environment; where the repository has no .venv, deepspeed is in PATH."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1", **environment}
    command = [REPOSITORY / "launch" / "train.sh", *arguments]
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("which stage?", "pretrain", "sft")),
        (("--max_steps", "3"), ("which stage?",)),
        (("pretraining",), ("no stage pretraining", "pretrain", "sft")),
    ],
)
def test_train_sh_names_the_stages_there_are(arguments, words, tmp_path):
    done = train_sh(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_train_sh_starts_no_controller_of_ray_in_every_process(stage, tmp_path):
    """Each would train a run of its own, in the same folder."""
    done = train_sh(stage, "--num_accelerators", 2, "--", "--save_dir", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert not done.stdout
    assert re.fullmatch(
        rf"error: {stage} starts its processes itself, by Ray: minigpt train {stage} …, "
        rf"or on a cluster \./launch/ray_submit\.sh -- minigpt train {stage} …\n",
        done.stderr,
    )
    assert not {"grpo", "ppo"} & set(train_sh(cwd=tmp_path).stderr.split())


MANY_MACHINES = ["--hostfile", "my hosts", "--include", "a@b:0,1"]


@pytest.mark.parametrize(
    ("given", "launcher", "stage_options"),
    [
        (["--config", "run.yaml"], ["--master_port", "FREE"], ["--config", "run.yaml"]),
        ([*MANY_MACHINES, "--", "--config", "run.yaml"], MANY_MACHINES, ["--config", "run.yaml"]),
        (
            [*MANY_MACHINES, "--master_port", "29501", "--", "--save_dir", "my run", "--data", "a", "b"],
            [*MANY_MACHINES, "--master_port", "29501"],
            ["--save_dir", "my run", "--data", "a", "b"],
        ),
        (["--num_gpus", "2", "--"], ["--num_gpus", "2", "--master_port", "FREE"], []),
    ],
)
def test_train_sh_gives_the_launcher_its_options_and_the_stage_its_own(given, launcher, stage_options, tmp_path):
    """What reaches `deepspeed`: a program of that name that prints what it was given, one argument a line."""
    (tmp_path / "bin").mkdir()
    deepspeed = tmp_path / "bin" / "deepspeed"
    deepspeed.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    deepspeed.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run([REPOSITORY / "launch" / "train.sh", "sft", *given], path, VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 0, done.stderr
    reached = done.stdout.splitlines()
    if "FREE" in launcher:  # a port that nobody has, so that several runs may share a machine
        port = reached[launcher.index("FREE")]
        assert 1024 < int(port) < 65536
        launcher = [port if word == "FREE" else word for word in launcher]
    assert reached == [*launcher, "--no_local_rank", "--module", "minigpt.trainer.train_full_sft", *stage_options]


@pytest.mark.slow
def test_train_sh_trains_on_two_processes_under_the_deepspeed_launcher(tmp_path):
    stories = (f"story {i}: the cat sat on mat {i * 7} and looked at moon {i}. " * 4 for i in range(300))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    small = ("--hidden_size", 32, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--num_key_value_heads", 1,
             "--intermediate_size", 64, "--seq_len", 64, "--compile", "false", "--dtype", "fp32",
             "--global_batch_size", 4)  # fmt: skip
    launcher = ("--num_accelerators", 2, "--")
    options = ("--data", "text.jsonl", "--save_dir", "run", "--max_steps", 3, *small)
    done = train_sh("pretrain", *launcher, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "× 2 ranks" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["tokens"] <= 3 * 4 * 64
    assert len(list((tmp_path / "run" / "checkpoints").glob("*/**/*optim_states.pt"))) == 2  # one a rank
    refused = train_sh("pretrain", *launcher, *options, "--max_step", 1, cwd=tmp_path)
    assert refused.returncode != 0
    assert "did you mean max_steps?" in refused.stderr + refused.stdout
