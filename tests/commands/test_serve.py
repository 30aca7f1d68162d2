"""`shardway serve`: the engines' commands, what is refused, and a completion over HTTP."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from launcher.chat import engines
from launcher.commands import serve
from launcher.errors import UserError
from tests.helpers.chat import edit
from tests.helpers.commands import SHARDWAY
from tests.helpers.ends import make_base, make_checkpoint
from tests.helpers.exports import consolidate

PACKAGES = {name: packages for name, (packages, _) in engines.ENGINES.items()}
# A stand-in for an engine: it reports how it was started.
STAND_IN = """
import json, os, sys
config = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv else None
said = {"argv": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY")}
if config:
    said |= {"config": open(config).read(), "mode": os.stat(config).st_mode & 0o777}
print(json.dumps(said))
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Choose which engines appear to be installed."""

    def only(*names: str) -> None:
        there = {package for name in names for package in PACKAGES[name]}
        monkeypatch.setattr(
            engines, "missing_packages", lambda name: [p for p in PACKAGES[name] if p not in there]
        )

    return only


def run(*words: object) -> None:
    serve.serve(parsed(*words))


def parsed(*words: object) -> Any:
    before, extra = serve._split_at_double_dash([str(word) for word in words])
    arguments = serve._parser().parse_args(before)
    arguments.extra = extra
    return arguments


def refusal(*words: object) -> str:
    with pytest.raises(UserError) as raised:
        run(*words)
    return str(raised.value)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "my key.txt"
    file.write_text("sesame-123\n")
    file.chmod(0o600)
    return file


def test_the_first_engine_that_is_installed_serves(
    tiny: Path, installed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for names, word in [
        (("vllm", "sglang", "transformers"), "vllm"),
        (("sglang", "transformers"), "sglang.launch_server"),
        (("transformers",), "HF_HUB_OFFLINE=1"),
    ]:
        installed(*names)
        run(tiny, "--dry-run")
        said = capsys.readouterr().out.splitlines()
        assert word in said[0]
        assert said[1].split() == ["base", "URL", "http://127.0.0.1:8000/v1"]


def test_an_engine_that_is_not_installed_is_refused_with_the_command(
    tiny: Path, installed: Any
) -> None:
    installed()
    assert "pip install 'transformers[serving]'" in refusal(tiny)
    assert "pip install vllm" in refusal(tiny, "--engine", "vllm")


def test_the_model_name_and_extra_arguments_reach_the_engine(
    tiny: Path, installed: Any, tmp_path: Path
) -> None:
    installed("vllm")
    export = Path(shutil.copytree(tiny, tmp_path / "first run/export"))
    request = engines.ServeRequest(export, "::1", 9, extra=("--dtype", "half"))
    argv = engines.server_command("vllm", request).argv
    assert argv[-8:] == [
        "--host", "::1", "--port", "9", "--served-model-name", "first run", "--dtype", "half",
    ]  # fmt: skip
    assert engines.server_command("transformers", request).model == str(export)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_key_reaches_the_engine_and_is_never_shown(
    engine: str, tiny: Path, key: Path, tmp_path: Path
) -> None:
    """Through the real command, with a stand-in for the engine."""
    module = {"vllm": "vllm/entrypoints/cli/main.py", "sglang": "sglang/launch_server.py"}[engine]
    (tmp_path / module).parent.mkdir(parents=True)
    (tmp_path / module).write_text(STAND_IN)
    (tmp_path / "tmp").mkdir()
    port = free_port()
    words = ("--host", "0.0.0.0", "--port", port, "--engine", engine, "--api-key-file", key)
    done = subprocess.run(
        [*SHARDWAY, "serve", tiny, *map(str, words), "--", "--seed", "3"],
        env={**with_path(tmp_path), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    said = json.loads(last)
    assert "sesame" not in "".join([*shown, *said["argv"], done.stderr])
    assert "Authorization: Bearer $(cat '" in shown[-1]
    assert said["argv"][-2:] == ["--seed", "3"] or said["argv"][-4:-2] == ["--seed", "3"]
    if engine == "vllm":
        assert said["key"] == "sesame-123"
    else:
        assert (said["config"], said["mode"]) == ('api-key: "sesame-123"\n', 0o600)
        assert "--config" in done.stderr


def test_listening_for_other_machines_needs_a_key(tiny: Path, key: Path, installed: Any) -> None:
    installed("vllm", "transformers")
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-node", ""):
        assert "--api-key-file FILE" in refusal(tiny, "--host", host, "--dry-run")
        words = (tiny, "--engine", "transformers", "--host", host, "--dry-run")
        assert "does not check keys" in refusal(*words)
    with_key = (tiny, "--engine", "transformers", "--api-key-file", key, "--dry-run")
    assert "does not check keys" in refusal(*with_key)
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        run(tiny, "--host", host, "--dry-run")
    run(tiny, "--host", "0.0.0.0", "--api-key-file", key, "--dry-run")


@pytest.mark.parametrize(
    "word", ["--host", "--host=0.0.0.0", "--ho", "--port", "--api-key=x", "--api_key", "--served"]
)
def test_extra_arguments_cannot_override_checked_settings(
    tiny: Path, installed: Any, word: str
) -> None:
    installed("vllm")
    assert f"{word} is not allowed after --" in refusal(tiny, "--dry-run", "--", word)


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"a\nb", b"\xff", b"k" * 5000])
def test_a_file_without_a_key_is_refused_and_not_shown(
    tiny: Path, installed: Any, tmp_path: Path, content: bytes
) -> None:
    installed("vllm")
    (tmp_path / "key").write_bytes(content)
    said = refusal(tiny, "--api-key-file", tmp_path / "key", "--dry-run")
    assert str(tmp_path / "key") in said
    assert "two words" not in said
    assert "cannot be read" in refusal(tiny, "--api-key-file", tmp_path / "gone", "--dry-run")


def test_a_key_file_that_others_can_read_is_reported(
    tiny: Path, installed: Any, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed("vllm")
    key.chmod(0o644)
    run(tiny, "--api-key-file", key, "--dry-run")
    assert "chmod 600" in capsys.readouterr().err


def test_a_port_in_use_and_an_invalid_host_are_refused(tiny: Path, installed: Any) -> None:
    installed("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on --host 127.0.0.1 --port {port}" in refusal(tiny, "--port", port)
    with pytest.raises(UserError, match="cannot listen on"):
        serve.check_port("x" * 300, 8000)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "8000.0"])
def test_an_invalid_port_is_refused(
    tiny: Path, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(tiny, "--port", port)
    assert left.value.code == 2
    assert "is not a port" in capsys.readouterr().err


def test_a_folder_that_servers_cannot_load_is_refused(
    tiny: Path, installed: Any, tmp_path: Path
) -> None:
    installed("transformers")
    assert "no config.json" in refusal(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text("{}")
    edit(adapter / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(tiny))
    assert f"shardway consolidate {adapter} --output DIR" in refusal(adapter)
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("a: 1\n")
    assert "no finished checkpoint" in refusal(run_folder)
    shutil.copytree(tiny, run_folder / "export")
    assert refusal(run_folder).endswith(f"shardway serve {run_folder}/export")
    at = Path(shutil.copytree(tiny, tmp_path / "model@home"))
    assert "after an @ as a revision" in refusal(at, "--dry-run")
    assert "leave --name out" in refusal(tiny, "--name", "mine", "--dry-run")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_path(folder: Path) -> dict[str, str]:
    """The environment with `folder` on the module search path."""
    paths = [str(folder), os.environ.get("PYTHONPATH", ""), os.getcwd()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.slow
@pytest.mark.skipif(
    bool(engines.missing_packages("transformers")),
    reason="needs pip install 'transformers[serving]'",
)
def test_a_completion_is_returned_over_http(tiny: Path, tmp_path: Path) -> None:
    """The printed request is sent to the server of transformers."""
    port = free_port()
    words = ("--engine", "transformers", "--port", str(port))
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*SHARDWAY, "serve", str(tiny), *words, "--", "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=with_path(tmp_path),
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        curl = (tmp_path / "log").read_text().splitlines()[3]
        found = re.search(r"curl (\S+) .* -d '(.*)'$", curl)
        assert found is not None
        body = {**json.loads(found[2]), "max_tokens": 8}
        request = urllib.request.Request(found[1], json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answered:
            answer = json.load(answered)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] == 8
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(
    bool(engines.missing_packages("transformers")),
    reason="needs pip install 'transformers[serving]'",
)
def test_an_openai_client_is_told_that_the_answer_ended(tmp_path: Path) -> None:
    """The base would not stop: its EOS token is not the one that ends an answer."""
    import openai

    step = make_checkpoint(make_base(tmp_path / "base"), tmp_path / "step-000002", "chatml")
    export = tmp_path / "export"
    consolidate(step, "--output", export)
    port = free_port()
    words = ("--engine", "transformers", "--port", str(port))
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*SHARDWAY, "serve", str(export), *words, "--", "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=with_path(tmp_path),
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.chat.completions.create(
            model=str(export), messages=[{"role": "user", "content": "hi"}], max_tokens=20
        )
        (choice,) = answer.choices
        assert (choice.finish_reason, choice.message.content) == ("stop", "h")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
