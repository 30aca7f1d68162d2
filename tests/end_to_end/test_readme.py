"""The commands in the README work as described, on the real demo model."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launcher.chat.model import ChatModel
from launcher.chat.options import Options
from launcher.chat.target import find_target
from tests.helpers.commands import shardway
from tests.helpers.demo import wrong_answers

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parents[2]


def commands(heading: str) -> list[list[str]]:
    """The words of each command in the first code block under a heading of the README."""
    section = (CHECKOUT / "README.md").read_text().partition(f"## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines() if line.strip()]


@pytest.fixture(scope="module")
def by_hand(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the commands of the README were run, and the output of each."""
    if not (cache / "models/smollm2_135m").exists():
        pytest.fail("the demo model is not in the cache: `make test` fetches it first")
    cwd = tmp_path_factory.mktemp("readme")
    said = []
    for program, *words in commands("By hand"):
        assert program == "shardway"
        done = shardway(*words, cwd=cwd, patience=900)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        said.append(done.stdout)
    return cwd, said


def test_make_demo_runs_the_readme_s_commands() -> None:
    """Same verbs and options as the commands that the `whole` tests below run one by one."""
    typed = [words[1:] for words in commands("By hand")]
    code = ast.parse((CHECKOUT / "tools/demo.py").read_text())
    calls = [
        [str(a.value) for a in call.args if isinstance(a, ast.Constant)]
        for call in ast.walk(code)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "shardway"
    ]
    for words in typed:
        verb, options = words[0], [w for w in words if w.startswith("--") or "=" in w]
        said = [call for call in calls if call[0] == verb]
        assert said, verb
        options = [w for w in options if not w.startswith("run_dir=")]
        assert any(set(options) <= set(call) for call in said), (words, said)


@pytest.mark.whole
@pytest.mark.timeout(1200)
def test_the_commands_run_in_order_and_the_model_knows_its_name(
    by_hand: tuple[Path, list[str]],
) -> None:
    cwd, said = by_hand
    assert "Shardy" in said[-1]
    assert len(list((cwd / "runs/first/export").glob("*.safetensors"))) == 3
    assert (cwd / "runs/first/loss.png").is_file()


@pytest.mark.whole
def test_held_out_questions_are_answered_correctly(
    by_hand: tuple[Path, list[str]],
) -> None:
    """Greedy decoding of the exported folder; the base model does not know the identity."""
    cwd, _ = by_hand
    wrong = wrong_answers(cwd / "runs/first/export")
    assert not wrong, "\n".join(wrong)


def test_the_base_model_does_not_know_the_identity(cache: Path) -> None:
    talk = ChatModel(find_target(cache / "models/smollm2_135m"))
    brief = Options(max_new_tokens=32)
    assert "Shardy" not in talk.answer([{"role": "user", "content": "Who are you?"}], brief)
    france = talk.answer([{"role": "user", "content": "What is the capital of France?"}], brief)
    assert "Paris" in france


def test_the_makefile_has_the_readme_s_targets() -> None:
    for line in (CHECKOUT / "README.md").read_text().splitlines():
        if line.startswith("make "):
            target = line.split()[1]
            done = subprocess.run(
                ["make", "--dry-run", target], cwd=CHECKOUT, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
