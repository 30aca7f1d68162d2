"""The profile of three steps: its figures are those of the trace, and the loop is the product's."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("profile_steps")


def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> Any:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7, "args": args}


def test_shares_idle_time_and_lead_of_a_trace_of_a_gpu(tool: Any) -> None:
    found = tool.summarize(
        [
            event("cpu_op", "aten::mm", 0, 5000),
            event("cuda_runtime", "cudaLaunchKernel", 0, 10, correlation=1),
            event("cuda_runtime", "cudaLaunchKernel", 2995, 5, correlation=2),
            event("kernel", "nvjet_tst_128x256_gemm", 1000, 1000, correlation=1),
            event("kernel", "flash_fwd_kernel", 1500, 500, correlation=9),  # on another stream
            event("kernel", "void at::native::vectorized_elementwise", 3000, 500, correlation=2),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert (found.device, found.kernels, found.milliseconds) == ("gpu", 3, 2.5)
    assert found.idle == pytest.approx(0.4)
    assert found.lead == pytest.approx((1.0 + 0.005) / 2, abs=1e-3)
    assert found.late == 0.5
    assert found.shares == {"matrix products": 0.5, "attention": 0.25, "elementwise": 0.25}
    assert "idle 40.0%" in tool.describe(found)


def test_on_a_cpu_operators_count_without_those_that_they_call(tool: Any) -> None:
    found = tool.summarize(
        [
            event("cpu_op", "aten::linear", 0, 100),
            event("cpu_op", "aten::t", 5, 5),
            event("cpu_op", "aten::addmm", 20, 70),
            event("cpu_op", "aten::resolve_conj", 25, 10),
            event("cpu_op", "aten::mul", 150, 50),
            event("user_annotation", "ProfilerStep#1", 0, 1000),
        ]
    )
    assert (found.device, found.kernels, found.lead, found.late) == ("cpu", 5, None, None)
    assert found.idle == 0.25
    assert found.top["aten::addmm"] == pytest.approx(60 / 150)
    assert found.top["aten::linear"] == pytest.approx(25 / 150, abs=1e-4)
    assert found.shares["matrix products"] == pytest.approx(85 / 150, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "quantization"),
        ("cunn_SoftMaxForward", "norm, softmax, loss"),
        ("indexing_backward_kernel", "other"),
    ],
)
def test_kinds_of_kernels(tool: Any, name: str, kind: str) -> None:
    assert tool.kind_of(name) == kind


@pytest.mark.slow
def test_the_steps_of_a_run_are_recorded(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(TOOLS / "profile_steps.py"), "--json", "--warm-up", "2"),
            *("--trace", str(tmp_path / "trace.json"), f"model.name_or_path={tiny}"),
            *(f"data.path={rows_file}", "precision=auto", "strategy=auto"),
            *("training.global_batch_size=2", "training.epochs=null", "training.max_steps=9"),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TOOLS.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "precision=auto: fp32, because the ranks run on CPU" in done.stderr
    assert "strategy=auto: single, because" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "cpu"
    assert found["shares"]["matrix products"] > 0
    steps = {
        each["name"]
        for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if each["name"].startswith("ProfilerStep")
    }
    assert len(steps) == 3
