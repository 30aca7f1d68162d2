"""One model type from end to end: train, save, resume, export, load; each step by Shardway's parts.

What must hold: the resumed run has the losses and logits of the one that went on, to the bit, with
its activations recomputed; the export has every tensor of the base; and `from_pretrained` of it
computes the logits that the trained model had.
"""

from __future__ import annotations

import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.commands import consolidate as verb
from launcher.config.schema.model import ModelConfig
from launcher.data.collate import IGNORED, collate
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.io.absent_towers import towers_may_be_absent
from launcher.io.model_class import causal_class, named_class, places_of
from launcher.model.load import build_model
from launcher.model.recurrent import separate_documents
from launcher.training.model_checks import check_model, separate_attention
from tests.helpers import checkpoints, parts
from tests.helpers.exports import stored
from tests.helpers.parts import Case
from tests.helpers.tiny_models import VOCABULARY, release

FRAMES = re.compile(r" \([\w./]+\.py:\d+(, [\w./]+\.py:\d+)*\)")  # of an error
WORLD = 2
STEPS = 2
LEARNING_RATE = 1e-2
TOLERANCE = 1e-4  # of the largest logit: an adapter is added to its base in another order
METHODS = ("lora", "full")
CPU = torch.device("cpu")


class Ranks(Protocol):
    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]: ...


@dataclass
class Row:
    """What became of a model type. `lora`, `full` and `packing`: "yes", "refused: …", "unbuilt: …"
    (nothing was tried), or "lost: …", which is a fault."""

    model_type: str
    model_class: str = ""
    trained_class: str = ""
    attention: str = ""
    loss: str = ""
    lora: str = ""
    full: str = ""
    packing: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.lora == self.full == "yes"

    @property
    def is_lost(self) -> bool:
        return any(each.startswith("lost") for each in (self.lora, self.full, self.packing))


def in_page(row: Row) -> str:
    """The row as a line of docs/models.md."""
    outcomes = [row.lora, row.full, row.packing]
    short = [each.partition(":")[0] for each in outcomes]
    reasons = dict.fromkeys(each.partition(": ")[2] for each in outcomes if ": " in each)
    reason = " · ".join(reasons).replace("|", "\\|").replace("\n", " ")
    reason = FRAMES.sub("", reason)
    cells = [row.model_type, row.model_class, *short, row.attention, reason]
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Trained:
    """What a rank reports of a run."""

    error: str | None = None  # of the user's: training has not begun
    crash: str | None = None
    logits: torch.Tensor | None = None
    losses: tuple[float, ...] = ()
    resumed_logits: torch.Tensor | None = None
    resumed_losses: tuple[float, ...] = ()
    model_class: str = ""
    attention: str = ""
    log: tuple[str, ...] = ()


def row_of(model_type: str, ranks: Ranks, rows: Path, work: Path) -> Row:
    """Try everything with `model_type`. `rows`: a file of conversations; `work`: a scratch folder,
    which is emptied."""
    shutil.rmtree(work, ignore_errors=True)
    row = Row(model_type)
    base = work / "base"
    try:
        row.model_class = release(model_type, base)
    except Exception as error:
        row.lora = row.full = row.packing = f"unbuilt: {_last_line(error)}"
        return row
    for method in METHODS:
        setattr(row, method, _land(row, method, base, ranks, rows, work / method))
    row.packing = packing_of(base)
    for name in ("lora", "full", "packing"):
        said = getattr(row, name).replace(str(base), "MODEL")
        setattr(row, name, said.replace(str(work / name / "run"), "RUN"))
    shutil.rmtree(work, ignore_errors=True)
    return row


def case_of(base: Path, rows: Path, method: str) -> Case:
    """The run that each model type makes."""
    return Case(
        base, rows, method=method, strategy="fsdp", steps=STEPS, learning_rate=LEARNING_RATE,
        scheduler="constant", global_batch_size=4,
    )  # fmt: skip


def _land(row: Row, method: str, base: Path, ranks: Ranks, rows: Path, work: Path) -> str:
    """Train with `method`, resume and export."""
    run, out = work / "run", work / "out"
    first, *_ = found = ranks.run(WORLD, train_and_resume, case_of(base, rows, method), run)
    assert isinstance(first, Trained)
    row.log = [*first.log]
    if crash := next((each.crash for each in found if each.crash), None):
        return f"lost: in training: {crash}"
    if first.error:
        return f"refused: {first.error}"
    row.trained_class, row.attention = first.model_class, first.attention
    row.loss = next((line for line in first.log if line.startswith("loss: ")), "")
    assert first.logits is not None
    assert first.resumed_logits is not None
    if not torch.isfinite(first.logits).all():
        return "lost: the trained model's logits are not finite"
    if first.losses[1:] != first.resumed_losses:
        return f"lost: resumed losses {first.resumed_losses}, not {first.losses[1:]}"
    if not torch.equal(first.logits, first.resumed_logits):
        return "lost: the resumed model computes other logits"
    try:
        export(run / f"checkpoints/step-{STEPS:06d}", base, out)
    except Exception as error:
        return f"lost: at export: {_last_line(error)}"
    return _compare(base, out, first.logits)


def export(checkpoint: Path, base: Path, out: Path) -> None:
    words = (checkpoint, "--base", base, "--output", out, "--max-shard-size", "100KB")
    verb.consolidate(verb.parser().parse_args([str(word) for word in words]))


def _compare(base: Path, out: Path, expected: torch.Tensor) -> str:
    names, found = stored(base).keys(), stored(out).keys()
    if lost := sorted(names - found):
        return f"lost: the export lacks {len(lost)} tensors: {', '.join(lost[:3])}"
    if more := sorted(found - names):
        return f"lost: the export has {len(more)} more tensors: {', '.join(more[:3])}"
    try:
        logits = _logits(_loaded(out))
    except Exception as error:
        return f"lost: the export cannot be loaded: {_last_line(error)}"
    scale = expected.abs().max()
    if (distance := (logits - expected).abs().max()) > TOLERANCE * scale:
        return f"lost: the export computes other logits (off by {distance / scale:.1e})"
    untrained = _logits(_loaded(base))
    if (untrained - expected).abs().max() <= 2 * TOLERANCE * scale:
        return "lost: training changed nothing"
    return "yes"


def _loaded(folder: Path, **options: Any) -> Any:
    """The model in fp32, as transformers loads it: a composite by its own class if
    AutoModelForCausalLM does not have it, or fills parameters at random."""
    config = AutoConfig.from_pretrained(folder)
    options |= {"dtype": torch.float32, "output_loading_info": True}
    with towers_may_be_absent():
        if causal_class(config):
            model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
            if not info["missing_keys"]:
                return model
        return named_class(config).from_pretrained(folder, **options)[0]


def train_and_resume(rank_info: RankInfo, case: Case, folder: Path) -> Trained:
    """Train two steps with a checkpoint of each; then resume from the first. Runs on a rank."""
    said: list[str] = []
    try:
        state, loader = _build(rank_info, case, said)
    except UserError as error:
        return Trained(error=str(error))
    except Exception as error:
        return Trained(crash=f"before step 1: {_where(error)}")
    try:
        recorder = parts.Recorder()
        saver = checkpoints.saver(state, case.config(), folder)
        parts.fit(state, loader, parts.plan(STEPS, save_steps=1), recorder, saver)
        logits, losses = _logits(state.strategy.model), recorder.column("loss")
        config = state.strategy.model.config.get_text_config()
        name, attention = _class_of(state.model), config._attn_implementation
        del state
        again = case.with_training(activation_checkpointing="full")
        state, loader = _build(rank_info, again, [])
        done = checkpoints.restore(state, folder, 1)
        recorder = parts.Recorder()
        parts.fit(state, loader, parts.plan(STEPS), recorder, done=done)
        resumed = _logits(state.strategy.model)
    except Exception as error:
        return Trained(crash=_where(error), log=(*said,))
    return Trained(
        logits=logits,
        losses=(*losses,),
        resumed_logits=resumed,
        resumed_losses=(*recorder.column("loss"),),
        model_class=name,
        attention=attention or "",
        log=(*said,),
    )


def _build(rank_info: RankInfo, case: Case, said: list[str]) -> Any:
    """As the worker does."""
    state, loader = parts.build(rank_info, case.config(), said.append)
    check_model(state, packed=False, dtype=torch.float32)
    return state, loader


def packing_of(base: Path) -> str:
    """Whether packed documents have the losses that they have alone."""
    config = ModelConfig(name_or_path=str(base))
    try:
        packed = load(config, base, packed=True)
        separate_attention(packed, packed, CPU, VOCABULARY, torch.float32)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"lost: {_where(error)}"
    try:
        alone = load(config, base, packed=False)
        found = _document_losses(packed.eval(), [documents()[:3], documents()[3:]], packed=True)
        expected = _document_losses(alone.eval(), [[row] for row in documents()], packed=False)
    except Exception as error:
        return f"lost: {_where(error)}"
    off = (found - expected).abs().max().item()
    return "yes" if off < 1e-4 else f"lost: the losses of packed documents are off by {off:.1e}"


def load(config: ModelConfig, base: Path, packed: bool) -> torch.nn.Module:
    """The model as `build_model` prepares it, with its weights, in one process."""
    model, _ = build_model(config, base, 0, torch.float32, packed)
    text: Any = model.config
    if (places := places_of(model)) is not None:
        with towers_may_be_absent():
            composite = named_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
        state = composite.state_dict()
        values = {name: state[places.outer(name)].float() for name in model.state_dict()}
        model.load_state_dict(values, assign=True)
    else:
        model = _loaded(base, attn_implementation=text._attn_implementation)
    if packed:
        separate_documents(model)
    return model


def documents() -> list[Any]:
    """Five rows of tokens, one of them a single token."""
    draw = np.random.default_rng(0)
    return [
        (draw.integers(3, VOCABULARY, n).astype(np.int32), draw.random(n) < 0.6)
        for n in (19, 3, 7, 22, 1)
    ]


@torch.no_grad()
def _document_losses(model: Any, sequences: list[list[Any]], packed: bool) -> torch.Tensor:
    batch = collate(sequences, 8, 0, packed)
    logits = model(**batch.inputs()).logits.flatten(0, 1)[batch.target_positions]
    found = cross_entropy(logits, batch.target_ids, reduction="none")
    return found[batch.target_ids != IGNORED]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=checkpoints.QUESTION, use_cache=False).logits
    return logits


def _class_of(model: Any) -> str:
    return type(getattr(model, "get_base_model", lambda: model)()).__name__


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
    return f"{_last_line(error)} ({at})"
