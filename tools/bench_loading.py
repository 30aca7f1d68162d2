"""The bytes, memory and time that a rank needs until the model is ready to train.

    python tools/bench_loading.py                          SmolLM2 on 2 ranks: CPU, or GPUs
    python tools/bench_loading.py --ranks 4 --methods qlora --strategies fsdp zero3
    python tools/bench_loading.py --model experts       a random Qwen3-MoE, stored expert by expert
    python tools/bench_loading.py --model composite     a random Qwen3.5 with its vision tower

Compared with `from_pretrained` on every rank. Each cell is measured once, in new processes: bytes
read from the files by the rank that reads most, the peak growth of its own memory, and seconds.
With --precision bf16, the dtype of the files, `from_pretrained` on CPU keeps mapped pages of the
files, which do not count as memory of a process.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import bench_parts
import torch
from bench_parts import MB, config_of, train_state
from torch import distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import Qwen3_5Config as CompositeConfig
from transformers import Qwen3_5ForConditionalGeneration as Composite
from transformers import Qwen3MoeConfig as ExpertsConfig
from transformers import Qwen3MoeForCausalLM as Experts

from launcher.commands.fetch import MODELS, fetch
from launcher.config.schema.method import METHODS
from launcher.config.schema.strategy import STRATEGIES
from launcher.distributed.process_group import RankInfo
from launcher.model.tiny import byte_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "depth": 8, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8,
    "out_hidden_size": 512,
}  # fmt: skip


def main() -> None:
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as made:
        is_made = arguments.model in RANDOM
        measure(arguments, make(arguments.model, Path(made)) if is_made else fetch(arguments.model))


def experts() -> PreTrainedModel:
    """120 M parameters in 8 layers of 36 experts, which 8 ranks do not divide."""
    return Experts(
        ExpertsConfig(**TEXT, moe_intermediate_size=256, num_experts=36, num_experts_per_tok=4)
    )


def composite() -> PreTrainedModel:
    """A text model of 60 M parameters, a vision tower of 30 M, and layers of linear attention."""
    return Composite(
        CompositeConfig(text_config=TEXT | {"intermediate_size": 3072}, vision_config=VISION)
    )


RANDOM = {"experts": experts, "composite": composite}


def make(name: str, folder: Path) -> Path:
    """Write a random model in bf16, as its publisher would."""
    torch.manual_seed(0)
    RANDOM[name]().to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the table of the model in `folder`."""
    print(f"{arguments.model}, {arguments.precision}, {arguments.ranks} ranks")
    print("| | read | peak | seconds |\n|---|---|---|---|")
    bench_parts.spawn(loading_all, arguments.ranks, folder, arguments.precision)
    for method in arguments.methods:
        for strategy in arguments.strategies:
            words = (folder, strategy, method, arguments.precision)
            bench_parts.spawn(loading, arguments.ranks, *words)


def loading(rank_info: RankInfo, folder: Path, strategy: str, method: str, precision: str) -> None:
    """Measure a row in which each rank reads and keeps only its own shard."""
    said: list[str] = []
    with bench_parts.memory(rank_info) as used:
        train_state(rank_info, config_of(folder, strategy, method, precision), said.append)
    found = next(match for line in said if (match := re.search(r"has read ([\d,.]+) MB", line)))
    read = torch.tensor(float(found[1].replace(",", "")))
    dist.all_reduce(read, dist.ReduceOp.MAX)
    _row(rank_info, f"`method={method} strategy={strategy}`", read.item(), used)


def loading_all(rank_info: RankInfo, folder: Path, precision: str) -> None:
    """Measure a row in which every rank loads the full model."""
    with bench_parts.memory(rank_info) as used:
        dtype = DTYPES[precision]
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(rank_info.device)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _row(rank_info, "`from_pretrained` on every rank", size / MB, used)


def _row(rank_info: RankInfo, name: str, read: float, used: bench_parts.Memory) -> None:
    peak = (used.gpu or used.host) / MB
    bench_parts.say(
        rank_info, f"| {name} | {read:,.1f} MB | {peak:,.0f} MB | {used.seconds:.1f} |\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[*MODELS, *RANDOM], default=MODELS[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="NAME")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), metavar="NAME")
    parser.set_defaults(methods=["full", "lora", "qlora"], strategies=["ddp", "fsdp", "zero3"])
    return parser


if __name__ == "__main__":
    main()
