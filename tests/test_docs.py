"""Links, files, modules and verbs named in pages, comments and docstrings exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from launcher.cli import COMMANDS

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [
    *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((CHECKOUT / "docs").glob("*.md")),
    CHECKOUT / "slurm/README.md",
]
# Sources that name current files and modules; the changelog also names former ones.
SOURCES = [
    *(page for page in PAGES if page.name != "CHANGELOG.md"),
    *(CHECKOUT / name for name in ("Makefile", "slurm/train.sbatch")),
    *sorted((CHECKOUT / "conf").rglob("*.yaml")),
    *(
        path
        for folder in ("launcher", "tools")
        for pattern in ("*.py", "*.yaml", "*.css")
        for path in sorted((CHECKOUT / folder).rglob(pattern))
    ),
]
ROOTS = ("launcher", "tests", "tools", "conf", "slurm", "docs")
NAMED_PATH = re.compile(
    r"(?<![\w./~$})-])((?:" + "|".join(ROOTS) + r")/(?:[\w./*<>…-]|\{[\w., -]+\})*)"
)
PLACEHOLDER = re.compile(
    r"[A-Z]{2,}|<\w+>|\{\w+\}|…|\.\.\."
)  # in NAME.py or conf/…: matches any name


def named(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def text_of(path: Path) -> str:
    """The text without URLs, whose paths belong to other sites."""
    return re.sub(r"\w+://\S+", "", path.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub makes from headings, and those that a page defines itself."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", prose))
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose, re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        same = (f"{anchor}-{number}" for number in range(1, 100))
        found.add(anchor if anchor not in found else next(a for a in same if a not in found))
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_have_existing_targets(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_verbs_in_pages_exist(page: Path) -> None:
    verbs = re.findall(r"(?:^|[`$] ?)shardway ([a-z]+)", page.read_text(), re.MULTILINE)
    assert {verb for verb in verbs if verb not in COMMANDS} == set()


def exists(path: str) -> bool:
    """Whether the file or folder exists, or at least one path matches the pattern."""
    alternatives = re.match(r"(.*)\{([^}]*,[^}]*)\}(.*)", path)
    if alternatives:
        before, names, after = alternatives.groups()
        return all(exists(f"{before}{name.strip()}{after}") for name in names.split(","))
    pattern = PLACEHOLDER.sub("*", path).rstrip("/")
    return any(CHECKOUT.glob(pattern)) if "*" in pattern else (CHECKOUT / pattern).exists()


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_named_files_exist(source: Path) -> None:
    words = NAMED_PATH.findall(text_of(source))
    paths = {word.rstrip(".-…") if not word.endswith("/…") else word for word in words}
    assert {path for path in paths if not exists(path)} == set()


@cache
def python_files() -> frozenset[str]:
    folders = ("launcher", "tests", "tools")
    return frozenset(
        f"/{path.relative_to(CHECKOUT)}"
        for folder in folders
        for path in (CHECKOUT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("page", [page for page in PAGES if page in SOURCES], ids=named)
def test_python_files_named_in_pages_exist(page: Path) -> None:
    """This includes files named by the end of their path, such as `cluster/local.py`."""
    names = set(re.findall(r"(?<![\w./*-])(?:[\w]+/)*[a-z_]\w*\.py\b", text_of(page)))
    assert {n for n in names if not any(file.endswith(f"/{n}") for file in python_files())} == set()


def defined(name: str) -> bool:
    """Whether `launcher.x.y` is a module, or a name in a module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = CHECKOUT.joinpath(*parts[:length])
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        if file.is_file():
            rest = parts[length:]
            return not rest or bool(re.search(rf"\b{rest[0]}\b", file.read_text()))
    return False


@pytest.mark.parametrize("source", SOURCES, ids=named)
def test_named_modules_exist(source: Path) -> None:
    names = set(re.findall(r"(?<![\w./])launcher(?:\.[A-Za-z]\w*)+", text_of(source)))
    assert {name for name in names if not defined(name)} == set()


def test_the_tree_in_the_readme_matches_the_checkout() -> None:
    """Every listed name exists, and every folder of the package is listed."""
    tree = (CHECKOUT / "README.md").read_text().partition("## The tree")[2].split("```")[1]
    inside: set[str] = set()
    for line in tree.strip("\n").splitlines():
        names = re.split(r" {3,}", line.strip().lstrip("0123456789 "))[0]
        folder = "launcher" if line.startswith(" ") else "."
        for name in names.split():
            assert (CHECKOUT / folder / name).exists(), line
            inside |= {name.rstrip("/")} if folder == "launcher" else set()
    kept = {"__pycache__", "demo", "templates"}  # they contain no code
    folders = {path.name for path in (CHECKOUT / "launcher").iterdir() if path.is_dir()}
    assert folders - inside - kept == set()
