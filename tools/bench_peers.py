"""Shardway compared with HF Trainer + PEFT, TRL and LLaMA-Factory: one LoRA job on this CPU.

    python tools/bench_peers.py install ~/peers      each peer in its own environment
    python tools/bench_peers.py run --peers ~/peers --output results
    python tools/bench_peers.py run --peers ~/peers --output results --data my_alpaca.json

SmolLM2-135M, LoRA rank 8 on all linear layers, bf16, AdamW at 1e-4, only answers in the loss. Each
arm uses the defaults or the best settings of its system (tools/peers/arms.py). The arms run in
alternating rounds, each in its own processes. Writes table.md, results.json and losses.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import arms, figures, install, picture, process, rows
from peers.arms import ARMS, SYSTEMS, Arm
from peers.job import SEED, Job
from peers.process import CHECKOUT, Run

from launcher.commands.fetch import MODELS, fetch
from launcher.errors import UserError
from launcher.io.cpus import usable_cpus

WARM_UP = 2  # steps that are not timed


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the arm, too
    arguments = parser().parse_args()
    try:
        if arguments.verb == "install":
            install.install(arguments.folder)
            return
        failed = bench(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


def bench(arguments: argparse.Namespace) -> bool:
    """Run all arms and write the results after each one. Returns whether an arm failed."""
    chosen = choose(arguments.arms)
    systems = {arm.system: interpreter(arm, arguments.peers) for arm in chosen}
    output: Path = arguments.output
    if output.exists() and any(output.iterdir()):
        raise UserError(f"--output {output} is not empty; name a new folder")
    output.mkdir(parents=True, exist_ok=True)
    folder, lengths = prepare(arguments)
    told = conditions(arguments, systems, lengths)
    runs: list[Run] = []
    for number, ranks, arm in turns(chosen, arguments.rounds, arguments.ranks):
        print(f"round {number + 1}, {ranks} rank(s), {arm.name}: ", end="", flush=True)
        scratch = output.absolute() / "runs" / f"{arm.name}-{ranks}-{number + 1}"
        scratch.mkdir(parents=True)
        job = job_of(arm, ranks, arguments, folder, scratch, lengths)
        runs.append(process.run(arm, job, systems[arm.system], number, arguments.seconds))
        print(say(runs[-1]), flush=True)
        write(output, runs, chosen, told)
    print(f"\n{(output / 'table.md').read_text()}")
    return any(run.failed for run in runs)


def turns(chosen: list[Arm], rounds: int, ranks: list[int]) -> Iterator[tuple[int, int, Arm]]:
    """Yield A B C A B C …, so that a drift of the machine's speed affects all arms equally."""
    return ((number, each, arm) for number in range(rounds) for each in ranks for arm in chosen)


def choose(names: list[str] | None) -> list[Arm]:
    """The arms with these names (None: all except the extra ones) that this Shardway can run.
    Prints the ones it cannot run, and why. Raises UserError for an unknown name."""
    known = {arm.name: arm for arm in ARMS}
    for name in names or ():
        if name not in known:
            raise UserError(f"--arms {name} is no arm; there are {', '.join(known)}")
    wanted = [known[name] for name in names] if names else [a for a in ARMS if not a.extra]
    for arm in wanted:
        if why := arms.missing(arm):
            print(f"{arm.name} is left out: {why}")
    return [arm for arm in wanted if not arms.missing(arm)]


def prepare(arguments: argparse.Namespace) -> tuple[Path, list[int]]:
    """Write the rows that fit. Returns the model folder and the number of tokens of each row."""
    from launcher.model.tokenizer import load_tokenizer

    folder = fetch(arguments.model)
    path, count = arguments.data, arguments.rows
    found = rows.of_file(path, count) if path else rows.made_up(count, SEED)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    kept, lengths = rows.fitting(found, tokenizer, arguments.max_length)
    rows.write(kept, arguments.output / "rows.json")
    print(f"{len(kept)} of {len(found)} rows, {sum(lengths):,} tokens")
    return folder, lengths


def job_of(
    arm: Arm,
    ranks: int,
    arguments: argparse.Namespace,
    folder: Path,
    scratch: Path,
    lengths: list[int],
) -> Job:
    """A packed arm uses as many packs per step as are needed for about the rows of a step."""
    micro_batch, per_step = arguments.micro_batch_size, arguments.global_batch_size
    if arm.packed:
        tokens = per_step * sum(lengths) / len(lengths)
        micro_batch, per_step = 1, figures.packs(tokens, arguments.max_length, ranks)
    if per_step % (micro_batch * ranks):
        raise UserError(
            f"--global-batch-size {per_step} is no multiple of --micro-batch-size {micro_batch} "
            f"× {ranks} ranks; choose --global-batch-size {micro_batch * ranks}"
        )
    return Job(
        model=str(folder),
        rows=str((arguments.output / "rows.json").absolute()),
        folder=str(scratch),
        ranks=ranks,
        steps=arguments.steps,
        micro_batch_size=micro_batch,
        accumulation=per_step // (micro_batch * ranks),
        max_length=arguments.max_length,
        settings=arm.settings,
    )


def say(run: Run) -> str:
    if run.failed:
        return f"failed, see {run.failed}"
    if len(run.steps) <= WARM_UP:
        return f"only {len(run.steps)} steps in its time"
    return (
        f"{figures.rate(run, 'trained_tokens', WARM_UP):.1f} trained tokens/s, "
        f"first step after {run.first_step_seconds:.1f} s, {len(run.steps)} steps"
    )


def interpreter(arm: Arm, peers: Path) -> Path:
    return Path(sys.executable) if arm.is_ours else install.python(peers, arm.system)


def conditions(
    arguments: argparse.Namespace, systems: dict[str, Path], lengths: list[int]
) -> dict[str, Any]:
    """The conditions that a reader must know to judge the figures."""
    git = ["git", "-C", str(CHECKOUT)]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _output([*git, "describe", "--always", "--dirty", "--abbrev=12"]),
        "processor": _processor(),
        "cores": usable_cpus(),
        "python": platform.python_version(),
        "versions": {name: install.versions(path) for name, path in systems.items()},
        "model": arguments.model,
        "rows": len(lengths),
        "tokens": sum(lengths),
        "data": arguments.data.name if arguments.data else f"made up, seed {SEED}",
        "max_length": arguments.max_length,
        "global_batch_size": arguments.global_batch_size,
        "micro_batch_size": arguments.micro_batch_size,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "warm_up_steps": WARM_UP,
    }


def write(output: Path, runs: list[Run], chosen: list[Arm], told: dict[str, Any]) -> None:
    """Write table.md, results.json and losses.png with the results so far."""
    record = {"conditions": told, "runs": [dataclasses.asdict(run) for run in runs]}
    (output / "results.json").write_text(json.dumps(record, indent=1))
    (output / "table.md").write_text(page(runs, chosen, told))
    picture.draw(runs, chosen, output / "losses.png")


def page(runs: list[Run], chosen: list[Arm], told: dict[str, Any]) -> str:
    """The tables, the conditions and the comparison of losses, in Markdown."""
    parts = [
        f"{told['date']}, commit {told['commit']}, {told['processor']}, {told['cores']} cores, "
        f"{told['model']}, {told['rows']} rows ({told['data']}), "
        f"{told['global_batch_size']} a step; medians of {told['rounds']} rounds, "
        f"{told['steps']} steps less {WARM_UP}\n"
    ]
    for name, found in told["versions"].items():
        parts.append(f"* {SYSTEMS[name]}: " + ", ".join(f"{n} {v}" for n, v in found.items()))
    for ranks in sorted({run.ranks for run in runs}):
        parts += [
            f"\n### {ranks} rank{'s' * (ranks > 1)}\n",
            figures.table(runs, chosen, ranks, WARM_UP),
            figures.ratios(runs, chosen, ranks, WARM_UP),
            figures.agreement(runs, chosen, ranks),
        ]
    return "\n".join(parts)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((at.partition(": ")[2] for at in lines if at.startswith("model name")), "unknown")


def _output(words: list[str]) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = made.add_subparsers(dest="verb", required=True)
    verbs.add_parser("install").add_argument("folder", type=Path)
    run = verbs.add_parser("run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run.add_argument("--peers", type=Path, required=True, help="where install has put them")
    run.add_argument("--output", type=Path, required=True, help="a new folder")
    run.add_argument("--model", choices=MODELS, default=MODELS[0], help="tiny: to try the arms")
    run.add_argument("--data", type=Path, help="alpaca rows; without, they are made up")
    run.add_argument("--rows", type=int, default=1000)
    run.add_argument("--max-length", type=int, default=512)
    run.add_argument("--arms", nargs="+", metavar="NAME", help=", ".join(a.name for a in ARMS))
    run.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    run.add_argument("--rounds", type=int, default=2)
    run.add_argument("--steps", type=int, default=8, help=f"of them {WARM_UP} to warm up")
    run.add_argument("--seconds", type=float, default=40.0, help="of a run, at most")
    run.add_argument("--global-batch-size", type=int, default=4, help="rows a step")
    run.add_argument("--micro-batch-size", type=int, default=2, help="rows a rank and forward")
    return made


if __name__ == "__main__":
    main()
