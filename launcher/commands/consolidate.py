"""`shardway consolidate`: turn any result of training into a verified folder that servers load.

    shardway consolidate runs/first --output runs/first/export --max-shard-size 5GB
    shardway consolidate runs/first/checkpoints/step-000045 --output export
    shardway consolidate path/to/adapter --base path/to/model --output export
    shardway consolidate path/to/model --adapter one --adapter two --output export
    shardway consolidate path/to/deepspeed/checkpoint --tag global_step40 --output export
    shardway consolidate path/to/model --output smaller --dtype bf16 --max-shard-size 2GB

SOURCE is recognized by its files: a run (its newest checkpoint is used), a Shardway checkpoint, a
DeepSpeed ZeRO or universal checkpoint, a folder of torch's distributed checkpoint (DCP), a PEFT
adapter, or a model folder. Existing files are not overwritten without --overwrite. --resume
continues an interrupted export.

Exit status: 0 the folder is written and verified, 2 the request cannot be fulfilled,
130 interrupted.
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

from launcher.commands import export_loss
from launcher.commands.arguments import command_parser, number, parse_size
from launcher.errors import UserError
from launcher.export.assembled import Options
from launcher.export.plan import Plan, make_plan
from launcher.export.source import find_source
from launcher.export.verify import check_structure
from launcher.export.writing import hub
from launcher.export.writing.journal import partial_folder
from launcher.export.writing.progress import EVERY_SECONDS, Progress
from launcher.export.writing.write import Report, WriteOptions, check_target, write

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BASE_FORMAT = "base"  # of --dtype
ASSUMED_RATE = 1e9  # bytes per second, for the estimate of a dry run


def main() -> None:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        consolidate(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        path = error.filename or partial_folder(arguments.output)
        raise UserError(
            f"{path}: {error.strerror or error}. Fix that; the same command with --resume "
            "continues with what is finished"
        ) from error


def consolidate(arguments: argparse.Namespace) -> None:
    """Make and print the plan, and write it unless this is a dry run.

    Raises UserError if the request cannot be fulfilled.
    """
    Progress.every_seconds = arguments.progress_seconds
    arguments.output = arguments.output.resolve()  # the folder itself, not a link to it
    options, write_options = _options(arguments), _write_options(arguments)
    rows = export_loss.check(arguments)
    source = find_source(
        arguments.source,
        arguments.base,
        arguments.adapter,
        arguments.tag,
        arguments.adapter_only,
        arguments.adapter_name,
        arguments.alpha,
        arguments.model_key,
    )
    plan = make_plan(source, options)
    check_target(plan, arguments.output, write_options)
    stream = sys.stderr if arguments.json else sys.stdout
    print(source.describe(), plan.describe(), *plan.notes, sep="\n", file=stream, flush=True)
    if arguments.dry_run:
        _print_dry_run(plan, arguments)
        return
    if arguments.push_to_hub:
        hub.require_login(arguments.push_to_hub)
    started = time.perf_counter()
    report = write(plan, arguments.output, write_options)
    summary = check_structure(arguments.output, set(report.files))
    seconds = time.perf_counter() - started
    print(f"{report.written / 1e6:,.1f} MB written at {_rate(report):,.0f} MB/s", file=stream)
    print(summary, file=stream)
    losses = None
    if rows is not None:
        losses = export_loss.evaluate(rows, source, arguments.output, options)
        print(losses.describe(), file=stream)
    if arguments.push_to_hub:
        print(hub.push(arguments.output, arguments.push_to_hub), file=stream)
    if arguments.json:
        result = _result(plan, arguments, report, seconds)
        result |= {} if losses is None else {"evaluation": losses.to_dict()}
        print(json.dumps(result, indent=2))


def _print_dry_run(plan: Plan, arguments: argparse.Namespace) -> None:
    """Print each tensor's action and file, and the bytes and time that the export would need."""
    parent = next(f for f in arguments.output.absolute().parents if f.exists())
    free = shutil.disk_usage(parent).free
    seconds = plan.nbytes / ASSUMED_RATE
    if arguments.json:
        rows = [line.split("  ") for line in plan.table()]
        keys = ("file", "tensor", "action", "dtype_and_shape", "size")
        plan_json = {"tensors": [dict(zip(keys, row, strict=True)) for row in rows]}
        print(json.dumps({**plan_json, "bytes": plan.nbytes, "free_bytes": free}, indent=2))
        return
    print(*plan.table(), sep="\n")
    print(
        f"{plan.nbytes / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free in {parent}; about "
        f"{seconds:.0f} s if the disk writes 1 GB/s, and the same time to read it back"
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
    """MB/s."""
    return report.written / 1e6 / max(1e-9, report.seconds)


def _options(arguments: argparse.Namespace) -> Options:
    return Options(
        max_shard_bytes=parse_size(arguments.max_shard_size),
        dtype=DTYPES.get(arguments.dtype),
        base_format=arguments.dtype == BASE_FORMAT,
        tied=arguments.tied,
        qlora_base=arguments.qlora_base,
        device=_device(arguments.device),
        adapter_only=arguments.adapter_only,
        text_only=arguments.text_only,
        modelfile=arguments.modelfile,
        trust_remote_code=arguments.trust_remote_code,
    )


def _device(name: str) -> str:
    return "cuda" if name == "auto" and torch.cuda.is_available() else "cpu"


def _write_options(arguments: argparse.Namespace) -> WriteOptions:
    """Raises UserError for a size that is none, or not enough memory for one file."""
    options = WriteOptions(
        workers=arguments.workers,
        memory=parse_size(arguments.memory, "--memory"),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        verify=not arguments.no_verify,
    )
    _ = options.parallel_files
    return options


def parser() -> argparse.ArgumentParser:
    """The parser of the verb's options."""
    result = command_parser("consolidate", __doc__)
    result.add_argument("source", type=Path, metavar="SOURCE")
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    _add_source_options(result)
    _add_result_options(result)
    _add_process_options(result)
    return result


def _add_source_options(result: argparse.ArgumentParser) -> None:
    add = result.add_argument
    add(
        "--base",
        metavar="DIR",
        help="the model that training started with, if SOURCE names another",
    )
    add(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="merge it into a model folder; repeat it to sum the deltas of several in fp32",
    )
    add("--adapter-name", metavar="NAME", help="which adapter of a SOURCE that contains several")
    add(
        "--alpha",
        type=number(float, 0),
        metavar="ALPHA",
        help="lora_alpha of an adapter in a state dict without adapter_config.json",
    )
    add(
        "--model-key",
        metavar="KEY",
        help="which model of a state that contains several, such as ema (default: the trained one)",
    )
    add("--tag", help="which checkpoint of a DeepSpeed folder (default: the one `latest` names)")
    add("--trust-remote-code", action="store_true", help="run the model folder's own Python code")


def _add_result_options(result: argparse.ArgumentParser) -> None:
    add = result.add_argument
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="maximum tensor bytes of a file: 5GB is 5·10⁹, GiB is accepted (default %(default)s)",
    )
    add(
        "--dtype",
        choices=("auto", *DTYPES, BASE_FORMAT),
        default="auto",
        help="of the result; auto: the base model's, that of a quantized one before it was "
        "quantized (default); base: quantized as the base is",
    )
    add(
        "--tied",
        choices=("auto", "untie", "error"),
        default="auto",
        help="if an adapter changes one side of tied embeddings: write both (auto) or stop (error)",
    )
    add(
        "--qlora-base",
        choices=("original", "dequantized"),
        default="original",
        help="what a QLoRA adapter is added to: the 16-bit model, or the dequantized weights that "
        "training used",
    )
    add("--adapter-only", action="store_true", help="extract a PEFT adapter instead of merging it")
    add("--text-only", action="store_true", help="the text model of a composite, without the rest")
    add("--modelfile", action="store_true", help="write an Ollama Modelfile beside the weights")
    add(
        "--evaluate",
        metavar="ROWS",
        help="print the loss per token of the result and of SOURCE on these rows (a file or folder "
        "as for data.path); both are loaded, one after the other",
    )
    add("--push-to-hub", metavar="REPO", help="upload the folder to a private repository")


def _add_process_options(result: argparse.ArgumentParser) -> None:
    add = result.add_argument
    add(
        "--device",
        choices=("cpu", "auto"),
        default="cpu",
        help="auto: multiply an adapter's factors on a GPU if there is one; useful from rank 128",
    )
    add(
        "--workers",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="files written in parallel (default: one for each core, up to 4)",
    )
    add("--memory", default="512MiB", metavar="SIZE", help="upper limit of the resident set")
    add("--resume", action="store_true", help="continue an export that was interrupted")
    add("--overwrite", action="store_true", help="replace DIR, or an unfinished export of it")
    add("--no-verify", action="store_true", help="skip reading back and recomputing")
    add("--dry-run", action="store_true", help="print the plan of every tensor, write nothing")
    add("--json", action="store_true", help="print the result as one JSON object on stdout")
    add(
        "--progress-seconds",
        type=number(float, 0),
        default=EVERY_SECONDS,
        metavar="S",
        help="between progress lines if stderr is not a terminal (default %(default)s)",
    )


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
