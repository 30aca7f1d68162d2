"""`shardway consolidate`: any result of training in, a verified folder out that servers load.

    shardway consolidate runs/first --output runs/first/export --max-shard-size 5GB
    shardway consolidate runs/first/checkpoints/step-000045 --output export
    shardway consolidate path/to/adapter --base path/to/model --output export
    shardway consolidate path/to/model --adapter one --adapter two --output export
    shardway consolidate path/to/deepspeed/checkpoint --tag global_step40 --output export
    shardway consolidate path/to/model --output smaller --dtype bf16 --max-shard-size 2GB

SOURCE is recognised by what is in it: a run (its newest checkpoint is taken), a Shardway
checkpoint, a DeepSpeed ZeRO or universal checkpoint, a folder of torch's distributed checkpoint
(DCP), a PEFT adapter, or a model folder. Nothing existing is overwritten without --overwrite; an
export that was interrupted goes on with --resume.

Exit status: 0 the folder stands and is verified, 2 the request cannot be met, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from launcher.errors import UserError
from launcher.export.gathered import Options
from launcher.export.plan import Plan, make_plan
from launcher.export.result import hub
from launcher.export.result.journal import partial_folder
from launcher.export.result.progress import EVERY_SECONDS, Progress
from launcher.export.result.write import How, Report, refuse_target, write
from launcher.export.source import find_source
from launcher.export.verify import structure
from launcher.sizes import parse_size

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ASSUMED_RATE = 1e9  # bytes a second, for the estimate of a dry run


def main() -> None:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        consolidate(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        where = error.filename or partial_folder(arguments.output)
        print(
            f"{where}: {error.strerror or error}. Mend that; the same command with --resume goes "
            "on with what is finished",
            file=sys.stderr,
        )
        sys.exit(2)


def consolidate(arguments: argparse.Namespace) -> None:
    """Plan, show, and unless it is a dry run write. Raises UserError."""
    Progress.every_seconds = arguments.progress_seconds
    arguments.output = arguments.output.resolve()  # the place itself, not a link to it
    source = find_source(
        arguments.source,
        arguments.base,
        arguments.adapter,
        arguments.tag,
        arguments.adapter_only,
    )
    plan = make_plan(source, _options(arguments))
    how = _how(arguments)
    refuse_target(plan, arguments.output, how)
    said = sys.stderr if arguments.json else sys.stdout
    print(source.describe(), plan.describe(), *plan.notes, sep="\n", file=said, flush=True)
    if arguments.dry_run:
        _show(plan, arguments)
        return
    if arguments.push_to_hub:
        hub.refuse_stranger(arguments.push_to_hub)
    began = time.perf_counter()
    report = write(plan, arguments.output, how)
    found = structure(arguments.output, set(report.files))
    seconds = time.perf_counter() - began
    print(f"{report.written / 1e6:,.1f} MB written at {_rate(report):,.0f} MB/s", file=said)
    print(found, file=said)
    if arguments.push_to_hub:
        print(hub.push(arguments.output, arguments.push_to_hub), file=said)
    if arguments.json:
        print(json.dumps(_result(plan, arguments, report, seconds), indent=2))


def _show(plan: Plan, arguments: argparse.Namespace) -> None:
    """A dry run: each tensor's action and file, and what the whole would take."""
    there = next(f for f in arguments.output.absolute().parents if f.exists())
    free = shutil.disk_usage(there).free
    seconds = plan.nbytes / ASSUMED_RATE
    if arguments.json:
        rows = [line.split("  ") for line in plan.table()]
        keys = ("file", "tensor", "action", "dtype_and_shape", "size")
        plan_json = {"tensors": [dict(zip(keys, row, strict=True)) for row in rows]}
        print(json.dumps({**plan_json, "bytes": plan.nbytes, "free_bytes": free}, indent=2))
        return
    print(*plan.table(), sep="\n")
    print(
        f"{plan.nbytes / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free in {there}; about "
        f"{seconds:.0f} s if the disk takes 1 GB/s, and as much again to read it back"
    )


def _result(
    plan: Plan, arguments: argparse.Namespace, report: Report, seconds: float
) -> dict[str, Any]:
    return {
        "output": str(arguments.output),
        "kind": plan.source.kind,
        "tensors": len(plan.actions),
        "bytes": plan.nbytes,
        "bytes_per_second": round(_rate(report) * 1e6),
        "seconds": round(seconds, 2),
        "files": {name: entry["bytes"] for name, entry in report.files.items()},
        "notes": list(plan.notes),
        "verified": not arguments.no_verify,
    }


def _rate(report: Report) -> float:
    return report.written / 1e6 / max(1e-9, report.seconds)


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        max_shard_bytes=parse_size(arguments.max_shard_size),
        dtype=DTYPES.get(arguments.dtype),
        tied=arguments.tied,
        qlora_base=arguments.qlora_base,
        device=_device(arguments.device),
        adapter_only=arguments.adapter_only,
        modelfile=arguments.modelfile,
        trust_remote_code=arguments.trust_remote_code,
    )


def _device(asked: str) -> str:
    return "cuda" if asked == "auto" and torch.cuda.is_available() else "cpu"


def _how(arguments: argparse.Namespace) -> How:
    return How(
        workers=arguments.workers,
        memory=parse_size(arguments.memory, "--memory"),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        verify=not arguments.no_verify,
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="shardway consolidate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("source", type=Path, metavar="SOURCE")
    add("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file in tensor bytes: 5GB is 5·10⁹, GiB is accepted (default %(default)s)",
    )
    add("--base", metavar="DIR", help="the model training began with, where SOURCE names another")
    add(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="merge it into a model folder; again for a second, their deltas are summed in fp32",
    )
    add("--tag", help="which checkpoint of a DeepSpeed folder (default: the one `latest` names)")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of the result; auto: the base model's (default)",
    )
    add(
        "--tied",
        choices=("auto", "untie", "error"),
        default="auto",
        help="an adapter that changes one side of tied embeddings: write both (auto) or stop",
    )
    add(
        "--qlora-base",
        choices=("original", "dequantized"),
        default="original",
        help="what a QLoRA adapter is added to: the 16-bit model, or the NF4 round trip of it that "
        "training saw",
    )
    add(
        "--device",
        choices=("cpu", "auto"),
        default="cpu",
        help="auto: multiply an adapter's factors on a GPU if there is one, worth it from rank 128",
    )
    add("--adapter-only", action="store_true", help="extract a PEFT adapter instead of merging it")
    add(
        "--workers", type=int, default=0, metavar="N", help="files written at once (default: cores)"
    )
    add("--memory", default="512MiB", metavar="SIZE", help="resident set to stay under")
    add("--resume", action="store_true", help="go on with an export that was interrupted")
    add("--overwrite", action="store_true", help="replace DIR, or an unfinished export of it")
    add("--no-verify", action="store_true", help="leave out reading back and recomputing")
    add("--modelfile", action="store_true", help="write an Ollama Modelfile beside the weights")
    add("--push-to-hub", metavar="REPO", help="upload the folder, to a private repository")
    add("--dry-run", action="store_true", help="print the plan of every tensor, write nothing")
    add("--json", action="store_true", help="the result as one JSON object on stdout")
    add(
        "--progress-seconds",
        type=float,
        default=EVERY_SECONDS,
        metavar="S",
        help="between lines of progress where stderr is no terminal (default %(default)s)",
    )
    add("--trust-remote-code", action="store_true", help="run the model folder's own Python code")
    return made


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
