"""The wheel works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(CHECKOUT)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_only_the_package_goes_into_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"launcher", "shardway-0.1.0.dist-info"}
    for carried in ("conf/config.yaml", "slurm/README.md", "constraints.txt", "demo/train.jsonl"):
        assert f"launcher/{carried}" in names


def test_the_wheel_composes_launches_and_exports_from_another_folder(
    wheel: Path, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    """A new environment with the wheel; its dependencies come from the current environment."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)
    for stray in ("_shardway.pth", "_editable_impl_shardway.pth"):
        assert not (site / stray).exists()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = tmp_path / "elsewhere"
    where.mkdir()

    def shardway(*words: str) -> str:
        done = subprocess.run(
            [str(home / "bin/shardway"), *words],
            cwd=where, env=environment, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = "import launcher; print(launcher.__file__)"
    found = subprocess.run(
        [str(home / "bin/python"), "-c", code], cwd=where, capture_output=True, text=True
    )
    assert str(site) in found.stdout, "the wheel's own package, not the checkout's"
    shardway(
        *("train", "model=tiny", "run_dir=run", "cluster.cpu_processes=2"),
        *("training.epochs=null", "training.max_steps=2"),
    )
    shardway("consolidate", "run", "--output", "out")
    assert "whole" in shardway("verify", "out")
