"""Liger's kernels compute the same as the chunked head and the modules of transformers.

They run on CPU in Triton's interpreter, in separate processes: the interpreter is chosen when
triton is imported, and Liger patches transformers' modeling modules for its entire process.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.cluster.devices import has_liger
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.model.chunked_loss import (
    ChunkedCrossEntropyHead,
    LigerHead,
    Targets,
    loss_targets,
    use_chunked_loss,
)
from launcher.model.liger import use_kernels
from tests.helpers import interpreter, parts
from tests.helpers.commands import losses, shardway
from tests.helpers.parts import Case
from tests.helpers.pool import RankPool
from tests.helpers.random_models import batch_of, gradients, model_of

pytestmark = pytest.mark.skipif(
    not has_liger(), reason="not installed: pip install liger-kernel triton"
)
ROOT = Path(__file__).parents[2]
WORDS, WIDTH = 37, 24
Found = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPool]:
    """Two ranks that run Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = RankPool(2)
    yield pool
    pool.close()


@dataclasses.dataclass(frozen=True)
class Head:
    dtype: torch.dtype = torch.float32
    smoothing: float = 0.0
    bias: bool = True
    trained: bool = True
    below: bool = True  # layers below the head are trained


def both(rank_info: RankInfo, case: Head) -> tuple[Found, Found]:
    """Loss and gradients of the chunked head and of Liger's."""
    interpreter.complete()
    return head_gradients(case, ChunkedCrossEntropyHead), head_gradients(case, LigerHead)


def head_gradients(case: Head, kind: type[nn.Linear]) -> Found:
    """20 positions with a target and 12 of padding."""
    torch.manual_seed(4)
    head = nn.Linear(WIDTH, WORDS, bias=case.bias).to(case.dtype).requires_grad_(case.trained)
    head.__class__ = kind
    hidden = torch.randn(2, 16, WIDTH).to(case.dtype).requires_grad_(case.below)
    at, ids = torch.zeros(32, dtype=torch.int64), torch.full((32,), -100)
    at[:20] = torch.randperm(32)[:20].sort().values
    ids[:20] = torch.randint(WORDS, (20,))
    with loss_targets(Targets(at, ids, torch.Size([2, 16]), case.smoothing)):
        loss = head(hidden)
        (loss * 3 / 7).backward()
    named = {"hidden": hidden, **dict(head.named_parameters())}
    found = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(
    ("case", "reached"),
    [
        (Head(), {"hidden", "weight", "bias"}),
        (Head(smoothing=0.2), {"hidden", "weight", "bias"}),
        (Head(bias=False), {"hidden", "weight"}),
        (Head(trained=False), {"hidden"}),
        (Head(below=False), {"weight", "bias"}),
    ],
)
def test_loss_and_gradients_equal_those_of_the_chunked_head(
    interpreted: RankPool, case: Head, reached: set[str]
) -> None:
    ((chunked, liger),) = interpreted.run(1, both, case)
    assert liger.keys() == chunked.keys() == {"loss", *reached}
    assert liger["loss"].dtype == torch.float32
    torch.testing.assert_close(liger, chunked, rtol=2e-5, atol=2e-6)


def test_bf16_is_as_close_to_fp32_as_the_chunked_head(interpreted: RankPool) -> None:
    case = Head(torch.bfloat16, smoothing=0.1)
    ((chunked, liger),) = interpreted.run(1, both, case)
    ((exact, _),) = interpreted.run(1, both, dataclasses.replace(case, dtype=torch.float32))
    assert liger["loss"].item() == pytest.approx(chunked["loss"].item(), rel=2e-3)
    # Liger rounds the gradients of logits to bf16 before it sums them for the bias.
    for name, times in (("hidden", 1.5), ("weight", 1.5), ("bias", 3.0)):
        assert liger[name].dtype == torch.bfloat16
        apart = (chunked[name] - exact[name]).norm(), (liger[name] - exact[name]).norm()
        assert apart[1] <= times * apart[0], name


def whole_model(rank_info: RankInfo) -> tuple[str, Any, Any, bool, torch.Size]:
    """A step with one batch and one batch without targets, with each head; then an evaluation."""
    interpreter.complete()
    batches = batch_of(1, 12, targets=7), batch_of(1, 8, targets=0)
    chunked = model_of("llama")
    use_chunked_loss(chunked, "chunked")
    model = model_of("llama")
    said = use_chunked_loss(model, "liger")
    steps = gradients(chunked, *batches), gradients(model, *batches)
    with (
        torch.no_grad(),
        loss_targets(Targets(*dataclasses.astuple(batches[0])[1:3], (1, 12), 0.0)),
    ):
        loss = model(input_ids=batches[0].input_ids).logits
    shape = model(input_ids=batches[0].input_ids).logits.shape
    return said, *steps, loss.requires_grad, shape


def test_a_model_with_the_liger_head_computes_the_same(interpreted: RankPool) -> None:
    ((said, chunked, liger, differentiable, shape),) = interpreted.run(1, whole_model)
    assert said.startswith("by Liger ")
    torch.testing.assert_close(liger, chunked, rtol=2e-5, atol=2e-6)
    assert liger["loss"][1] == 0
    assert not differentiable
    assert shape == (1, 12, 211)


def with_kernels(rank_info: RankInfo, kind: str, settings: dict[str, Any]) -> tuple[str, Any, Any]:
    """Loss and gradients before and with Liger's kernels; nearly all positions have targets."""
    interpreter.complete()
    model, batch = model_of(kind, **settings), batch_of(2, 6, targets=9)
    before = gradients(model, batch)
    said = use_kernels(model, "liger")
    return said, before, gradients(model, batch)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {}, "5 × LigerRMSNorm, 2 × LigerSwiGLUMLP, rotary positions of transformers."),
        ("qwen3", {}, "9 × LigerRMSNorm, 2 × LigerSwiGLUMLP, rotary"),
        ("gemma", {}, "2 × LigerGEGLUMLP, 5 × LigerRMSNorm, rotary"),
        ("mistral", {"hidden_act": "gelu"}, "not the MLP, whose activation is GELUActivation"),
        ("qwen3_moe", {}, "not the experts"),
    ],
)
def test_a_model_with_liger_modules_computes_the_same(
    interpreted: RankPool, kind: str, settings: dict[str, Any], words: str
) -> None:
    ((said, before, found),) = interpreted.run(1, with_kernels, kind, settings)
    assert words in said
    assert said.endswith(words) or "in this whole process" in said
    torch.testing.assert_close(found, before, rtol=2e-5, atol=2e-6)


def refused(rank_info: RankInfo, kind: str) -> str:
    interpreter.complete()
    with pytest.raises(UserError) as error:
        use_kernels(model_of(kind), "liger")
    return str(error.value)


def test_an_architecture_that_liger_does_not_know_is_refused(interpreted: RankPool) -> None:
    (said,) = interpreted.run(1, refused, "gpt2")
    assert said.startswith("training.kernels=liger: Liger ")
    assert said.endswith(" has no kernels for gpt2 → training.kernels=torch")


def trained(rank_info: RankInfo, case: Case) -> list[float]:
    if "liger" in case.training_options.values():
        interpreter.complete()
    return parts.losses(rank_info, case)


@pytest.mark.parametrize(
    ("method", "strategy", "kept", "packing"),
    [
        ("lora", "fsdp", "off", True),
        ("full", "fsdp", "full", False),
        pytest.param("lora", "zero3", "off", False, marks=pytest.mark.whole),
        pytest.param("qlora", "ddp", "off", False, marks=pytest.mark.whole),
    ],
)
def test_two_ranks_train_like_torch_kernels(
    ranks: Any,
    interpreted: RankPool,
    tiny: Path,
    rows_file: Path,
    method: str,
    strategy: str,
    kept: str,
    packing: bool,
) -> None:
    case = Case(
        tiny, rows_file, method=method, strategy=strategy, packing=packing, global_batch_size=2,
        steps=2, training_options={"activation_checkpointing": kept},
    )  # fmt: skip
    expected = ranks.run(2, trained, case)
    liger = case.with_training(loss="liger", kernels="liger")
    for found, plain in zip(interpreted.run(2, trained, liger), expected, strict=True):
        assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_a_run_from_the_command_line_completes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from tests.helpers.interpreter import complete\ncomplete()\n"
    )
    words = ("train", "model=tiny", "cluster.cpu_processes=1", "tracking.plot=false")
    words += ("training.epochs=null", "training.max_steps=2", "training.global_batch_size=1")
    done = shardway(*words, "run_dir=plain", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels: torch's" in done.stdout
    path = [str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    liger = ("training.loss=liger", "training.kernels=liger", "run_dir=liger")
    done = shardway(*words, *liger, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss: by Liger" in done.stdout
    assert "5 × LigerRMSNorm, 2 × LigerSwiGLUMLP, rotary positions" in done.stdout
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
