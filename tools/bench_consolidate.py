"""Consolidation compared with its peers and with the disk: medians and ratios of alternating arms.

    python tools/bench_consolidate.py                        LoRA merge, 1.5 B parameters
    python tools/bench_consolidate.py --sizes 1 2 4          also with 2 and 4 times the layers
    python tools/bench_consolidate.py --what zero dcp        sharded checkpoints, 0.4 B parameters
    python tools/bench_consolidate.py --rounds 5 --scratch /data

lora: Shardway, PEFT's `merge_and_unload` + `save_pretrained`, and the lower bound: plain O_DIRECT
writes of the same bytes, reads of them, and the import of torch, one after the other. The rows
called cold start with a base that is not in the page cache. zero: Shardway and DeepSpeed's
`zero_to_fp32` on a ZeRO-3 checkpoint of two ranks. dcp: Shardway and torch's `dcp_to_torch_save` on
a DCP folder. Each arm runs in its own process: wall time and peak resident set include its imports.
Weights are random. Other sources are read through the page cache of the machine, as in normal use.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_parts
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from launcher.distributed.process_group import RankInfo
from launcher.export.writing import readback
from launcher.export.writing.direct_writer import Sink
from launcher.io.cpus import usable_cpus

LAYERS = 28  # at size 1: the shape of Qwen2.5-1.5B, 1.54 B parameters
RANK = 16
GB = 1e9

PRELUDE = """
import atexit, os, sys
def tell():
    with open(os.environ["PEAK_FILE"], "w") as file:
        file.write(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
atexit.register(tell)
"""
OURS = "sys.argv.insert(1, 'consolidate'); from launcher.cli import main; main()"
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, max_shard_size="1GB")
"""
ZERO = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
convert(sys.argv[1], sys.argv[2], max_shard_size="1GB", safe_serialization=True)
"""
DCP = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
import os
os.makedirs(sys.argv[2]); dcp_to_torch_save(sys.argv[1], sys.argv[2] + "/pytorch_model.bin")
"""


@dataclass
class Taken:
    seconds: float
    peak: float  # bytes of resident set
    phase: float = 0.0  # bytes per second of writing alone, if the arm reports it


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="bench-") as folder:
        for what in arguments.what:
            for size in arguments.sizes if what == "lora" else [1]:
                scratch = Path(folder) / f"{what}-{size}"
                scratch.mkdir()
                {"lora": lora, "zero": zero, "dcp": dcp}[what](scratch, size, arguments)
                shutil.rmtree(scratch)


def lora(scratch: Path, size: int, arguments: argparse.Namespace) -> None:
    base, adapter = _model(scratch, LAYERS * size)
    ours = [base, "--adapter", adapter, "--max-shard-size", "1GB"]
    arms = {
        "shardway": lambda out: _shardway(*ours, "--output", out),
        "shardway --no-verify": lambda out: _shardway(*ours, "--output", out, "--no-verify"),
        "plain writes, reads, import": lambda out: _floor(out, _bytes(base)),
        "shardway, cold": lambda out: _cold(base, lambda: _shardway(*ours, "--output", out)),
        "cold base read plainly": lambda out: _cold(base, lambda: _read(base, out)),
    }
    if not arguments.ours_only:
        arms["PEFT merge + save"] = lambda out: _run(PEFT, base, adapter, out)
    _table(
        f"LoRA merge, {_bytes(base) / 2 / GB:.2f} B parameters in bf16", arms, scratch, arguments
    )


def zero(scratch: Path, size: int, arguments: argparse.Namespace) -> None:
    bench_parts.spawn(save_zero, 2, scratch)
    _sharded("ZeRO-3", ZERO, "zero_to_fp32", scratch, arguments)


def dcp(scratch: Path, size: int, arguments: argparse.Namespace) -> None:
    bench_parts.spawn(save_dcp, 2, scratch)
    _sharded("DCP", DCP, "dcp_to_torch_save", scratch, arguments)


def _sharded(what: str, peer: str, name: str, scratch: Path, arguments: argparse.Namespace) -> None:
    """Compare fp32 input with fp32 output, because the peers support only this."""
    source = scratch / "source"
    ours = [source, "--max-shard-size", "1GB", "--dtype", "fp32"]
    arms = {
        "shardway": lambda out: _shardway(*ours, "--output", out),
        "shardway --no-verify": lambda out: _shardway(*ours, "--output", out, "--no-verify"),
        "plain writes, reads, import": lambda out: _floor(out, int(_parameters(scratch) * 4)),
    }
    if not arguments.ours_only:
        arms[name] = lambda out: _run(peer, source, out)
    _table(
        f"{what}, {_parameters(scratch) / GB:.2f} B parameters in fp32", arms, scratch, arguments
    )


def save_zero(rank_info: RankInfo, scratch: Path) -> None:
    """Save a ZeRO-3 checkpoint before any step: bf16, fp32 masters, SGD (it has no moments)."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    config = _config(6)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.save_checkpoint(scratch / "source")
    if rank_info.is_main:
        _note(scratch, config)


def save_dcp(rank_info: RankInfo, scratch: Path) -> None:
    """Save the fp32 weights sharded by FSDP2 under the key `model`."""
    import torch.distributed.checkpoint as saver
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    config = _config(6)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    tensors = dict(model.named_parameters())
    saver.save({"model": tensors}, checkpoint_id=scratch / "source")
    if rank_info.is_main:
        _note(scratch, config)


def _note(scratch: Path, config: Any) -> None:
    config.save_pretrained(scratch / "source")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    (scratch / "parameters").write_text(str(count))


def _parameters(scratch: Path) -> int:
    return int((scratch / "parameters").read_text())


def _config(layers: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936 if layers >= LAYERS else 32000,
        tie_word_embeddings=layers >= LAYERS,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )


def _model(scratch: Path, layers: int) -> tuple[Path, Path]:
    """Make a random model with one file per layer, and a rank-16 adapter for all linear layers."""
    from transformers import AutoModelForCausalLM

    config = _config(layers)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    base, adapter = scratch / "base", scratch / "adapter"
    base.mkdir()
    adapter.mkdir()
    config.save_pretrained(base)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    halves: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for name, meta in shapes.items():
        if name == "lm_head.weight":
            continue  # tied
        layer = name.split(".")[2] if ".layers." in name else "other"
        tensor = torch.empty(meta.shape, dtype=torch.bfloat16).normal_(std=0.02)
        parts.setdefault(layer, {})[name] = tensor
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            halves[f"{module}.lora_A.weight"] = torch.randn(RANK, meta.shape[1]) * 0.02
            halves[f"{module}.lora_B.weight"] = torch.randn(meta.shape[0], RANK) * 0.02
    weight_map: dict[str, str] = {}
    for layer, tensors in parts.items():
        save_file(tensors, base / f"model-{layer}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(halves, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.split(".")[-3] for name in halves}),
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


def _shardway(*words: object) -> Taken:
    taken, out = _measure(OURS, [*words, "--json"])
    taken.phase = json.loads(out)["bytes_per_second"]
    return taken


def _run(code: str, *words: object) -> Taken:
    return _measure(code, list(words))[0]


def _measure(code: str, words: list[object]) -> tuple[Taken, str]:
    """Run `code` in a new interpreter. It reports its own peak, because the value that the system
    keeps for a child process starts at the memory of the parent."""
    with tempfile.NamedTemporaryFile("r") as peak:
        environment = os.environ | {"PEAK_FILE": peak.name}
        command = [sys.executable, "-c", PRELUDE + code, *map(str, words)]
        began = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        return Taken(seconds, int(peak.read()) * 1024), ended.stdout


def _floor(out: Path, nbytes: int) -> Taken:
    """Write the same bytes with O_DIRECT, one file at a time, and flush them. Read them back past
    the page cache. Import torch. The rate is that of the writes."""
    out.mkdir()
    block = 8 << 20
    began = time.perf_counter()
    left, number = nbytes, 0
    while left:
        with Sink(out / str(number)) as sink:
            for _ in range(min(10**9, left) // block):
                sink.reserve(block)
            sink.reserve(min(10**9, left) % block)
            sink.finish()
        left -= min(10**9, left)
        number += 1
    written = time.perf_counter()
    for file in out.iterdir():
        for _ in readback.blocks(file):
            pass
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return Taken(time.perf_counter() - began, 0, nbytes / (written - began))


def _cold(base: Path, arm: Callable[[], Taken]) -> Taken:
    """`arm` after the page cache has dropped the files of `base`."""
    os.sync()
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return arm()


def _read(base: Path, out: Path) -> Taken:
    """Read the files of `base` through the page cache, one after the other."""
    out.mkdir()
    began = time.perf_counter()
    for path in base.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
    return Taken(time.perf_counter() - began, 0)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _table(title: str, arms: dict[str, Any], scratch: Path, arguments: argparse.Namespace) -> None:
    taken: dict[str, list[Taken]] = {name: [] for name in arms}
    with tqdm(total=arguments.rounds * len(arms), desc=title, disable=None) as bar:
        for _ in range(arguments.rounds):
            for name, arm in arms.items():
                out = scratch / "out"
                taken[name].append(arm(out))
                shutil.rmtree(out)
                os.sync()
                bar.update()
    first = statistics.median(each.seconds for each in taken["shardway"])
    print(f"\n{title}, {arguments.rounds} rounds, {usable_cpus()} cores\n")
    print("| arm | wall, median (range) | × shardway | peak resident set | while writing |")
    print("|---|---|---|---|---|")
    for name, each in taken.items():
        seconds = sorted(one.seconds for one in each)
        middle = statistics.median(seconds)
        peak = statistics.median(one.peak for one in each)
        phase = statistics.median(one.phase for one in each)
        print(
            f"| {name} | {middle:.2f} s ({seconds[0]:.2f}–{seconds[-1]:.2f}) "
            f"| {middle / first:.2f} "
            f"| {f'{peak / 1e6:,.0f} MB' if peak else '–'} "
            f"| {f'{phase / GB:.2f} GB/s' if phase else '–'} |"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--what", nargs="+", choices=("lora", "zero", "dcp"), default=["lora"])
    add("--sizes", nargs="+", type=int, default=[1], help="× 1.5 B parameters (28 layers)")
    add("--rounds", type=int, default=3)
    add("--ours-only", action="store_true", help="leave the peers out")
    add("--scratch", type=Path, help="a folder on the disk to be measured")
    return parser


if __name__ == "__main__":
    main()
