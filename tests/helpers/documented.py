"""The command lines in pages, in the headers of conf/ and in help texts."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = (
    *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")),
    *sorted((CHECKOUT / "docs").glob("*.md")),
)
HELP = (
    *(
        CHECKOUT / name
        for name in ("launcher/cli.py", "launcher/train.py", "launcher/ui/server.py")
    ),
    *sorted((CHECKOUT / "launcher/commands").glob("*.py")),
    *sorted((CHECKOUT / "tools").glob("*.py")),
)
CONF = (*sorted((CHECKOUT / "conf").rglob("*.yaml")), CHECKOUT / "slurm/train.sbatch")
PROGRAMS = r"(?:shardway|sbatch|torchrun|python) "
REST = "…"  # stands for more overrides


@dataclass(frozen=True)
class Command:
    """A command line, and the file that shows it."""

    line: str
    file: str

    @property
    def words(self) -> list[str]:
        """What a shell would pass on, without comments and words that stand for more."""
        return [word for word in shlex.split(self.line, comments=True) if word != REST]


def commands() -> list[Command]:
    """Every command line, each once."""
    found: dict[str, str] = {}
    for reader, files in ((_in_page, PAGES), (_in_header, CONF), (_in_help, HELP)):
        for file in files:
            for line in reader(file):
                for part in line.split(" && "):
                    found.setdefault(part.strip(), str(file.relative_to(CHECKOUT)))
    return [Command(line, file) for line, file in found.items()]


def _in_page(file: Path) -> Iterator[str]:
    """The lines of the bash blocks, continued lines as one, without the text of here-documents."""
    for block in re.findall(r"^```bash\n(.*?)^```", file.read_text(), re.DOTALL | re.MULTILINE):
        block = re.sub(r"(<<'(\w+)')\n.*?^\2$", r"\1", block, flags=re.DOTALL | re.MULTILINE)
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            yield re.sub(r"\s+#.*", "", line)


def _in_header(file: Path) -> Iterator[str]:
    """The comments that are commands; in conf/config.yaml also those of the help text."""
    for line in file.read_text().splitlines():
        if match := re.match(rf"(?:# *| {{10}})({PROGRAMS}.*)", line):
            yield _without_remark(match[1])


def _in_help(file: Path) -> Iterator[str]:
    """The indented commands in the strings of a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in node.value.splitlines():
                if match := re.match(rf" {{4}}({PROGRAMS}.*)", line):
                    yield _without_remark(match[1])


def _without_remark(line: str) -> str:
    """The command before two spaces or a comment, behind which a remark stands."""
    return re.split(r" {2,}| #", line)[0]
