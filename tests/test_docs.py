"""The documentation says what is there: links, file names, identifiers and commands are checked against the code."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from minigpt.cli import VERBS, parse_options
from minigpt.rl.submit import SubmitOptions
from minigpt.trainer.train_full_sft import SFTOptions
from minigpt.trainer.train_lora import LoRATrainOptions
from minigpt.trainer.train_pretrain import PretrainOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TWINS = [page for page in PAGES if page.name.endswith(".zh-CN.md")]
CHINESE = ".zh-CN.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
SCRIPT_NAME = re.compile(r"[\w./-]*\w\.(?:py|sh)")
SCRIPTS = {
    "trainer/train_pretrain.py": PretrainOptions,
    "trainer/train_full_sft.py": SFTOptions,
    "trainer/train_lora.py": LoRATrainOptions,
}
STAGES = {"pretrain": PretrainOptions, "sft": SFTOptions, "lora": LoRATrainOptions}
GENERAL_FLAGS = {"--help", "--debug", "--config", "--print_config", "--version", "--batch_size"}
LAUNCHER_FLAGS = {"--num_gpus", "--hostfile"}
RAY_FLAGS = {"--num-cpus", "--num-gpus", "--port", "--dashboard-port", "--dashboard-host"}  # of `ray start`


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks in these languages; all of them when none is named."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [text for language, text in found if not languages or language in languages]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(text) for _, text in HEADING.findall(prose(page))}


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_twin = pytest.mark.parametrize("twin", TWINS, ids=name_of)


# ----------------------------------------------------------------------------------------------------- links and names


@every_page
def test_relative_links_lead_to_files_and_headings_that_exist(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@cache
def scripts() -> frozenset[str]:
    """Names of all scripts of the repository; git is not asked, as there is none in an unpacked archive."""
    left_out = (".", "out", "build", "dist")  # what git ignores, too
    folders = [folder for folder in ROOT.iterdir() if not folder.name.startswith(left_out)]
    files = [file for folder in folders for file in folder.rglob("*.*") if file.suffix in (".py", ".sh")]
    return frozenset(file.relative_to(ROOT).as_posix() for file in files)


@every_page
def test_scripts_and_modules_that_are_named_exist(page):
    for code in INLINE_CODE.findall(prose(page)):
        for name in SCRIPT_NAME.findall(code):
            known = scripts()
            wanted = name.removeprefix("./")
            places = (wanted, f"minigpt/{wanted}")  # the guide works from within minigpt/
            by_name = "/" not in wanted and any(path.endswith("/" + wanted) for path in known)
            assert by_name or any(place in known for place in places), f"`{name}` does not exist"


@every_page
def test_dotted_names_can_be_imported(page):
    for code in INLINE_CODE.findall(prose(page)):
        if not re.fullmatch(r"(?:minigpt|data_prep)(?:\.\w+)+", code):
            continue
        parts = code.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[length:]:
                found = getattr(found, attribute)
            break


@cache
def defined_names(path: Path) -> frozenset[str]:
    """Functions, classes, methods and constants of a file, found without importing it."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            elements = target.elts if isinstance(target, ast.Tuple) else [target]
            names |= {element.id for element in elements if isinstance(element, ast.Name)}
    return frozenset(names)


@every_page
def test_names_in_tables_of_code_are_defined_in_their_file(page):
    for line in prose(page).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        file = re.fullmatch(r"`([\w/]+(?:\.py|/))`", cells[0])
        if not line.startswith("|") or not file or len(cells) < 2:
            continue
        path = ROOT / file[1]
        modules = [path] if path.suffix else list(path.rglob("*.py"))
        defined = frozenset().union(*map(defined_names, modules))
        if not modules:
            continue
        for name in INLINE_CODE.findall(cells[1]):
            if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name):
                assert name in defined, f"{file[1]} defines no {name}"


# ------------------------------------------------------------------------------------------------------------ commands


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell block, as words."""
    lines = script.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in ("|", "&&", "||", ";", "&"):
                if words:
                    found.append(words)
                words = []
            else:
                words.append(word)
    return [words[: words.index(">")] if ">" in words else words for words in found]


def check_command(words: list[str]) -> None:
    """Parse the command as it would be parsed when it runs; nothing is run."""
    program, *arguments = words
    if program == "minigpt":
        check_verb(arguments)
    elif program.startswith("./launch/"):
        assert (ROOT / program).stat().st_mode & 0o111, f"{program} cannot be executed"
        check_launcher(program, arguments)
    elif program == "python" and arguments[0] in SCRIPTS:
        parse_options(SCRIPTS[arguments[0]], arguments[1:])
    elif program == "python" and arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} does not exist"
    elif program == "pytest":
        assert all((ROOT / a).exists() for a in arguments if a.startswith("tests/"))


def check_verb(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        return
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in VERBS), 0)
    assert words, f"there is no verb in `minigpt {' '.join(arguments)}`"
    verb = VERBS[" ".join(arguments[:words])]
    module, _, name = verb.options.partition(":")
    rest = arguments[words:]
    if "--help" in rest or "--print_config" in rest:
        return
    parse_options(getattr(importlib.import_module(module), name), rest, positional=verb.positional)


def check_launcher(program: str, arguments: list[str]) -> None:
    if program.endswith("train.sh"):
        stage, *rest = arguments
        if "--" in rest:
            rest = rest[rest.index("--") + 1 :]
        parse_options(STAGES[stage], rest)
    elif program.endswith("ray_submit.sh"):
        parse_options(SubmitOptions, arguments[: arguments.index("--")])
    elif program.endswith("quickstart.sh"):
        check_verb(["quickstart", *arguments])


@every_page
def test_commands_in_code_blocks_parse(page):
    for script in blocks(page, "bash", "sh"):
        for words in commands(script):
            check_command(words)


def flags() -> set[str]:
    known = GENERAL_FLAGS | LAUNCHER_FLAGS | RAY_FLAGS
    for verb in VERBS.values():
        module, _, name = verb.options.partition(":")
        options = getattr(importlib.import_module(module), name)
        known |= {f"--{field}" for field in options.__dataclass_fields__}
    return known


@every_page
def test_flags_and_verbs_in_the_text_exist(page):
    known = flags()
    for code in INLINE_CODE.findall(prose(page)):
        words = code.split()
        if words[0] == "minigpt" and len(words) > 1 and not words[1].startswith("-"):
            verb = next((" ".join(words[1:n]) for n in (3, 2) if " ".join(words[1:n]) in VERBS), None)
            group = any(name.startswith(f"{words[1]} ") for name in VERBS) and len(words) == 2
            assert verb or group, f"`{code}`: no such command"
        if words[0] == "minigpt" or code.startswith("--"):
            for word in words:
                if word.startswith("--") and len(word) > 2:
                    assert word.partition("=")[0] in known, f"`{code}`: no option {word}"


@every_page
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3, 8, 9, 10])
def test_scripts_of_the_first_milestones_run_as_printed(number, tmp_path):
    """As from within `minigpt/`: a folder with links to its packages keeps what a script writes out of the tree."""
    (page,) = [p for p in ROOT.glob(f"docs/milestones/{number}-*.md") if p not in TWINS]
    for package in ("model", "dataset", "trainer", "scripts"):
        (tmp_path / package).symlink_to(ROOT / "minigpt" / package)
    script = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if number == 2:
        assert f"`{done.stdout.strip()}`" in page.read_text(encoding="utf-8")  # the number that the page promises


# --------------------------------------------------------------------------------------------------- English, Chinese


def test_the_guide_is_there_in_both_languages():
    guide = [p for p in ROOT.glob("docs/milestones/*.md") if p not in TWINS]
    assert len(guide) == 10
    for page in [ROOT / "README.md", *guide]:
        assert page.with_name(page.stem + CHINESE) in TWINS


@every_twin
def test_twins_have_the_same_headings_blocks_and_links(twin):
    original = twin.with_name(twin.name.removesuffix(CHINESE) + ".md")
    levels = [[len(marks) for marks, _ in HEADING.findall(prose(page))] for page in (original, twin)]
    assert levels[0] == levels[1]
    assert blocks(original) == blocks(twin)
    english, chinese = ([t.partition("#")[0] for t in LINK.findall(prose(page))] for page in (original, twin))

    def neutral(targets: list[str], own: Path, other: Path) -> list[str]:
        plain = [t.replace(CHINESE, ".md") for t in targets if t not in (own.name, other.name)]
        return sorted(plain)

    assert neutral(english, original, twin) == neutral(chinese, twin, original)


@every_twin
def test_chinese_pages_are_chinese_and_prefer_chinese_pages(twin):
    text = INLINE_CODE.sub("", prose(twin))
    han, latin = len(re.findall(r"[\u4e00-\u9fff]", text)), len(re.findall(r"[A-Za-z]+", text))
    assert han > latin
    original = twin.name.removesuffix(CHINESE) + ".md"
    for target in LINK.findall(prose(twin)):
        if target.endswith(".md") and not target.endswith(CHINESE) and target != original:
            assert not (twin.parent / target.replace(".md", CHINESE)).exists(), f"{target} has a Chinese page"


def test_the_index_lists_every_page():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(index))}
    missing = [name_of(page) for page in PAGES if page.is_relative_to(ROOT / "docs") and page not in listed | {index}]
    assert not missing


def test_the_log_is_dated_and_in_order():
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2})", (ROOT / "docs" / "log.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert dates
    assert all(newer >= older for newer, older in pairwise(dates))
