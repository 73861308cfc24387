"""How the house is built: what may import what, one object a module, and a wheel that works outside the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MINIGPT = REPOSITORY / "minigpt"
PACKAGES = ("minigpt", "data_prep", "ds_configs")
FREE = {"minigpt", "minigpt.errors", "minigpt.system", "minigpt._seed_alias"}  # they import nothing of ours themselves
COMMAND_LINE = {"minigpt.__main__", "minigpt.cli", "minigpt.commands", "minigpt.quickstart", "minigpt.milestones"}

# Area: the areas it may import anywhere, and those it may import only inside a function.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "minigpt.model": (set(), set()),  # and one exception, below
    "minigpt.dataset": (set(), set()),
    "minigpt.generation": ({"minigpt.model", "minigpt.dataset"}, set()),
    "minigpt.observe": (set(), set()),
    "minigpt.evaluation": ({"minigpt.dataset"}, {"minigpt.model", "minigpt.generation", "minigpt.observe"}),
    "minigpt.trainer": (
        {"minigpt.dataset", "minigpt.model", "minigpt.observe"},
        {"minigpt.evaluation", "minigpt.generation", "data_prep"},
    ),
    "minigpt.rl": (
        {
            *("minigpt.trainer", "minigpt.generation", "minigpt.evaluation"),
            *("minigpt.model", "minigpt.dataset", "minigpt.observe"),
        },
        set(),
    ),
    "data_prep": ({"minigpt.dataset"}, set()),
}
RL_STAGES = {"minigpt.trainer.train_ppo", "minigpt.trainer.train_grpo"}  # they lie with the other stages
EXCEPTIONS = {("minigpt.model", "MiniGPT.generate", "minigpt.generation")}


@dataclass(frozen=True)
class Import:
    """One import statement of ours by ours."""

    file: Path
    line: int
    source: str
    target: str
    scope: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line}: {self.source} imports {self.target}"


def area_of(module: str) -> str:
    """`minigpt.model.hf` → `minigpt.model`; `data_prep.pack` → `data_prep`."""
    if module in RL_STAGES:
        return "minigpt.rl"
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "minigpt" else parts[0]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(node: ast.Import | ast.ImportFrom, file: Path) -> list[str]:
    """The full names of what a statement imports, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or ""
    if node.level:
        package = module_of(file).split(".")
        if file.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        module = ".".join([*package, *([module] if module else [])])
    # `from minigpt import model` names a package as surely as `import minigpt.model`
    return [f"{module}.{alias.name}" for alias in node.names] if "." not in module else [module]


def statements(tree: ast.AST, scope: str = "") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """Import statements with the dotted name of the class and function around them; "" at module level."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, scope
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from statements(node, f"{scope}.{node.name}".strip("."))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from ((inner, "TYPE_CHECKING") for inner, _ in statements(node))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue  # `python -m …`: there the module is a program, and programs call the command line
        else:
            yield from statements(node, scope)


def find_imports(file: Path) -> Iterator[Import]:
    """Imports of our packages in a file that cross the border of an area."""
    source = area_of(module_of(file))
    for node, scope in statements(ast.parse(file.read_text(encoding="utf-8"))):
        for module in imported_modules(node, file):
            target = area_of(module)
            ours = module.split(".")[0] in ("minigpt", "data_prep", "ds_configs")
            if ours and target != source and target not in FREE:
                yield Import(file, node.lineno, source, target, scope)


def source_files() -> list[Path]:
    files = [*MINIGPT.rglob("*.py"), *(REPOSITORY / "data_prep").rglob("*.py")]
    assert len(files) > 50
    return files


def is_allowed(found: Import) -> bool:
    if found.source not in ALLOWED:
        return True  # entry points: whom they may import is nobody's worry, who imports them is (the next test)
    anywhere, inside = ALLOWED[found.source]
    if found.scope == "TYPE_CHECKING":
        return found.target in anywhere | inside
    return (
        found.target in anywhere
        or (found.target in inside and bool(found.scope))
        or (found.source, found.scope, found.target) in EXCEPTIONS
    )


def test_imports_run_one_way():
    wrong = [str(found) for file in source_files() for found in find_imports(file) if not is_allowed(found)]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_the_command_line_the_server_or_the_scripts():
    doors = {"minigpt.serve", "minigpt.scripts", *COMMAND_LINE}
    wrong = [
        str(found)
        for file in source_files()
        for found in find_imports(file)
        if found.target in doors and found.source not in COMMAND_LINE
        if (found.source, found.target) != ("minigpt.scripts", "minigpt.serve")  # web_demo.py is one line of it
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "text", "verdict"),
    [
        ("minigpt/model/x.py", "from minigpt.dataset.chat import ChatEncoder", False),
        ("minigpt/model/x.py", "def f():\n    from minigpt.generation.generate import stream", False),
        (
            "minigpt/model/x.py",
            "class MiniGPT:\n  def generate(self):\n    from minigpt.generation import engine",
            True,
        ),
        ("minigpt/dataset/x.py", "from ..model import hf", False),
        ("minigpt/dataset/x.py", "from minigpt import model", False),
        ("minigpt/trainer/x.py", "from minigpt.evaluation import answers", False),
        ("minigpt/trainer/x.py", "def f():\n    from minigpt.evaluation import answers", True),
        ("minigpt/trainer/x.py", "from .loop import train", True),
        ("minigpt/dataset/x.py", "from minigpt.errors import UserError", True),
        ("data_prep/x.py", "import minigpt.model.hf", False),
    ],
)
def test_the_rules_see_what_they_should(file, text, verdict):
    found = [
        Import(REPOSITORY / file, node.lineno, area_of(module_of(REPOSITORY / file)), area_of(module), scope)
        for node, scope in statements(ast.parse(text))
        for module in imported_modules(node, REPOSITORY / file)
    ]
    relevant = [f for f in found if f.target != f.source and f.target not in FREE]
    assert all(map(is_allowed, relevant)) is verdict


ALIASES = """
import model.model_minigpt, dataset.lm_dataset, trainer.options, scripts
import minigpt.model.model_minigpt, minigpt.dataset.lm_dataset, minigpt.trainer.options, minigpt.scripts
from model.model_minigpt import MiniGPT, MiniGPTConfig
from trainer import schedule
assert model.model_minigpt.MiniGPT is minigpt.model.model_minigpt.MiniGPT
assert isinstance(MiniGPT(MiniGPTConfig(hidden_size=32, num_hidden_layers=1)), minigpt.model.model_minigpt.MiniGPT)
assert model is minigpt.model and dataset is minigpt.dataset and scripts is minigpt.scripts
assert dataset.lm_dataset.SFTDataset is minigpt.dataset.lm_dataset.SFTDataset
assert trainer.options.TrainOptions is minigpt.trainer.options.TrainOptions
assert schedule.learning_rate is minigpt.trainer.schedule.learning_rate
assert minigpt.model.model_minigpt.__spec__.name == "minigpt.model.model_minigpt"
"""


@pytest.mark.parametrize("short_names_first", [True, False])
def test_the_guides_short_names_are_the_same_modules(short_names_first, tmp_path):
    lines = ALIASES.strip().splitlines()
    if not short_names_first:
        lines[0], lines[1] = lines[1], lines[0]
    subprocess.run([sys.executable, "-B", "-c", "\n".join(lines)], cwd=MINIGPT, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy so that nothing is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "out*", "test_*.jsonl")
        shutil.copytree(REPOSITORY / package, copy / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, copy], check=True)
    return next(folder.glob("minigpt-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", target, wheel], check=True)
    return target


def run_installed(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program of the installed wheel, run far from the checkout; the wheel comes before the editable install."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_the_wheel_holds_data_prep_the_ds_configs_and_the_tokenizer(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = {".py", ".json", ".jinja", ".html", ".yaml"}
    files = [f for package in PACKAGES for f in (REPOSITORY / package).rglob("*") if f.suffix in kinds]
    sources = {str(f.relative_to(REPOSITORY)) for f in files if not re.search(r"/(__pycache__|out)", str(f))}
    assert not sources - names
    assert {"minigpt/model/tokenizer.json", "ds_configs/zero3.json", "data_prep/pack.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs", "launch"))]


def test_the_installed_wheel_works_outside_the_checkout(installed):
    helped = run_installed(installed, str(installed / "bin" / "minigpt"), "--help")
    assert helped.returncode == 0
    assert "quickstart" in helped.stdout
    verified = run_installed(installed, "-m", "minigpt.cli", "verify", "3")
    assert verified.returncode == 0, verified.stderr
    assert "milestone 3 is passed" in verified.stdout
    program = "import minigpt, ds_configs, data_prep; print(minigpt.__file__, ds_configs.__file__, data_prep.__file__)"
    places = run_installed(installed, "-c", program).stdout.split()
    assert len(places) == 3
    assert all(Path(place).is_relative_to(installed) for place in places)


def test_recipes_of_the_installed_wheel_are_found_outside_the_checkout(installed):
    recipe = ("--config", "minigpt/rl/recipes/grpo_2x8gpu.yaml", "--init", "none")
    begun = run_installed(installed, "-m", "minigpt.cli", "train", "grpo", *recipe)
    assert begun.stderr.startswith("error: --init none holds no model"), "what is looked at after --deepspeed"
