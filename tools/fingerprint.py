"""Prove that a refactor changes no number: record what training and export compute, compare later.

    python tools/fingerprint.py record before.json      # at the commit before the change
    python tools/fingerprint.py compare before.json     # after it: exit status 1 if a bit differs
    python tools/fingerprint.py compare before.json --only 'lora-zero3'

All measurements use the `shardway` command, so that the same script works with any commit
(`PYTHONPATH=CHECKOUT` chooses one). It records losses and gradient norms of ten steps for each
strategy × method × precision, a resume in the middle for some of them, and the checksums of the
exported tensors and of all files next to them. The numbers are valid for one machine and one set
of package versions: record and compare with the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

STRATEGIES = {
    "single": [],
    "fsdp": ["cluster.cpu_processes=2"],
    "hsdp": ["cluster.cpu_processes=4", "strategy.shard_size=2"],
    "zero1": ["cluster.cpu_processes=2"],
    "zero2": ["cluster.cpu_processes=2"],
    "zero3": ["cluster.cpu_processes=2"],
}
METHODS = {
    "full": [],
    "freeze": ["method.layers=1", "method.extra_modules=[norm]"],
    "lora": ["method.rank=4", "method.dropout=0.1"],
    "qlora": ["method.rank=4"],
}
PRECISIONS = ("fp32", "bf16")
RESUMED = ("full-{}-fp32", "lora-{}-bf16")  # these cells are also resumed after step 5
VARIANTS = {  # of LoRA, trained under fsdp on two ranks and exported
    "dora": ["method.dora=true"],
    "pissa": ["method.pissa=true"],
    "rslora": ["method.rslora=true", "method.modules_to_save=[norm]"],
    "packed": ["data.packing=true"],
}
# Exported cells, and the options of `shardway consolidate`.
EXPORTS = {
    "lora-fsdp-fp32": [],
    "lora-zero3-bf16": ["--dtype", "fp32"],
    "full-fsdp-fp32": [],
    "full-zero3-bf16": [],
    "full-hsdp-bf16": ["--max-shard-size", "50KB"],
    "freeze-zero2-fp32": [],
    "freeze-fsdp-bf16": [],
    "qlora-fsdp-bf16": [],
    "qlora-zero3-fp32": ["--qlora-base", "dequantized"],
    "lora-single-fp32": ["--adapter-only"],
    "dora": [],
    "pissa": [],
    "rslora": ["--dtype", "fp16"],
    "moe": [],
}
COMMON = [
    "data=messages",
    "data.max_length=96",
    "optimizer.learning_rate=1e-3",
    "training.max_steps=10",
    "training.epochs=null",
    "training.micro_batch_size=1",
    "training.global_batch_size=8",
    "training.max_grad_norm=0.5",
    "scheduler.warmup_steps=3",
    "checkpoint.save_steps=5",
]


@dataclass(frozen=True)
class Work:
    """The folder of the measured runs, and the overrides that all of them share."""

    folder: Path

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def moe(self) -> Path:
        return self.folder / "moe"

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def shardway(self, *arguments: str) -> None:
        """Run the command in a new process. Raises RuntimeError with its output if it fails."""
        environment = {**os.environ, "SHARDWAY_CACHE": str(self.folder / "cache")}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "launcher.cli", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")

    def train(self, name: str, *overrides: str) -> list[list[float]]:
        """Train, or resume, the run `name`: loss and gradient norm of each step."""
        run = self.run_dir(name)
        self.shardway("train", *COMMON, f"data.path={self.rows}", f"run_dir={run}", *overrides)
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [[each["loss"], each["grad_norm"]] for each in records if "loss" in each]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="names to run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the run folders there")
    arguments = parser.parse_args()
    if arguments.action == "record" and arguments.file.exists():
        parser.error(f"{arguments.file} exists; name a new file")
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="fingerprint-"))
    try:
        found = measure(Work(folder.absolute()), arguments.only, arguments.jobs)
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    if arguments.action == "record":
        arguments.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} measurements in {arguments.file}")
        return
    recorded = json.loads(arguments.file.read_text(encoding="utf-8"))
    wanted = {name: each for name, each in recorded.items() if re.search(arguments.only, name)}
    differing = differences(wanted, found)
    print(*differing, sep="\n")
    print(f"{len(wanted)} measurements compared, {len(differing)} differ")
    sys.exit(1 if differing or not wanted else 0)


def measure(work: Work, only: str, jobs: int) -> dict[str, Any]:
    """All measurements by name: `train/…` and `resume/…` contain [loss, gradient norm] of each
    step, `export/…` contains a checksum for each tensor and file."""
    work.folder.mkdir(parents=True, exist_ok=True)
    work.shardway("fetch", "tiny")
    write_rows(work.rows)
    make_moe(work.moe)
    found: dict[str, Any] = {}
    for stage in (trainings(work), resumes(work), exports(work)):
        chosen = {name: task for name, task in stage.items() if re.search(only, name)}
        with ThreadPoolExecutor(jobs) as pool:
            running = {name: pool.submit(task) for name, task in chosen.items()}
            for name, future in tqdm(running.items(), desc=next(iter(stage)).split("/")[0]):
                found[name] = future.result()
    return found


def trainings(work: Work) -> dict[str, Callable[[], Any]]:
    """Ten steps of every cell, of the LoRA variants and of a mixture of experts."""
    tasks: dict[str, Callable[[], Any]] = {}
    for cell, overrides in cells().items():
        tasks[f"train/{cell}"] = partial(work.train, cell, *overrides)
    lora = [*cells()["lora-fsdp-fp32"], "method.dropout=0.0"]
    for name, overrides in VARIANTS.items():
        tasks[f"train/{name}"] = partial(work.train, name, *lora, *overrides)
    moe = [*lora, f"model.name_or_path={work.moe}"]
    tasks["train/moe"] = partial(work.train, "moe", *moe)
    return tasks


def cells() -> dict[str, list[str]]:
    """The overrides of each strategy × method × precision, by name."""
    return {
        f"{method}-{strategy}-{precision}": [
            "model=tiny",
            f"method={method}",
            f"strategy={strategy}",
            f"precision={precision}",
            *METHODS[method],
            *STRATEGIES[strategy],
        ]
        for method in METHODS
        for strategy in STRATEGIES
        for precision in PRECISIONS
    }


def resumes(work: Work) -> dict[str, Callable[[], Any]]:
    """Steps 6 to 10 again, in a new run that starts from the checkpoint after step 5."""
    tasks: dict[str, Callable[[], Any]] = {}
    for cell in (pattern.format(strategy) for strategy in STRATEGIES for pattern in RESUMED):
        resume = f"resume={work.run_dir(cell)}/checkpoints/step-000005"
        tasks[f"resume/{cell}"] = partial(work.train, f"{cell}-resumed", *cells()[cell], resume)
    return tasks


def exports(work: Work) -> dict[str, Callable[[], Any]]:
    """The checksums of each export."""
    return {
        f"export/{name}": partial(export, work, name, options) for name, options in EXPORTS.items()
    }


def export(work: Work, name: str, options: list[str]) -> dict[str, str]:
    """Consolidate a run. Returns checksums of all files except the manifest, which has times."""
    output = work.folder / "exports" / name
    work.shardway("consolidate", str(work.run_dir(name)), "--output", str(output), *options)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    return {
        str(path.relative_to(output)): checksum(path, str(work.folder))
        for path in files
        if "manifest" not in path.name
    }


def checksum(path: Path, folder: str) -> str:
    """SHA-256 of a file. For JSON, the path of `folder` is removed and lists of names are sorted,
    because PEFT keeps them in sets."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(sorted_names(json.loads(content)), sort_keys=True).encode()
        content = content.replace(folder.encode(), b"")
    return hashlib.sha256(content).hexdigest()


def sorted_names(value: Any) -> Any:
    """`value` with every list of strings sorted."""
    if isinstance(value, dict):
        return {key: sorted_names(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted(value) if all(isinstance(each, str) for each in value) else value
    return value


def write_rows(path: Path) -> None:
    """Thirteen conversations of uneven length."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(13):
            messages = [
                {"role": "user", "content": "ask " * (1 + number % 5)},
                {"role": "assistant", "content": f"answer {number} " * (1 + number % 4)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def make_moe(folder: Path) -> None:
    """A random Mixtral with the tiny model's tokenizer."""
    if folder.exists():
        return
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    tiny = folder.parent / "cache/models/tiny"
    settings = json.loads((tiny / "config.json").read_text())
    shape = {key: settings[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = MixtralConfig(
        **shape,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny / name).is_file():
            shutil.copy(tiny / name, folder / name)


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each measurement that is not bitwise equal, with the first difference."""
    lines = []
    for name, before in recorded.items():
        now = found.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            files = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            lines.append(f"{name}: {', '.join(files)}")
        elif isinstance(before, list) and isinstance(now, list):
            both = zip(before, now, strict=False)
            step = next((at for at, (old, new) in enumerate(both, 1) if old != new), "the length")
            lines.append(f"{name}: differs at step {step}")
        else:
            lines.append(f"{name}: not measured")
    return lines


if __name__ == "__main__":
    main()
