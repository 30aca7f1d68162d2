"""The chunked loss equals the loss of full logits, and full logits are never created."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.model import chunked_loss as head_module
from launcher.model.chunked_loss import ChunkedCrossEntropyHead, use_chunked_loss
from launcher.training.loss import token_loss
from tests.helpers import parts
from tests.helpers.parts import Case
from tests.helpers.random_models import VOCABULARY, WIDTH, batch_of, gradients, model_of

IN_CHUNKS = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "gpt2", "gpt_neox", "opt",
    "olmo2", "gemma", "gemma3_text", "glm4", "stablelm", "starcoder2", "smollm3", "bloom",
)  # fmt: skip
TRANSFORMED = {
    "gemma2": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.7},
    "cohere2": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "block_types": ["recurrent", "attention"]},
    "falcon_h1": {"lm_head_multiplier": 1.5, "mamba_d_ssm": 64, "mamba_n_heads": 8,
                  "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
}  # fmt: skip


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64 positions of a batch are four chunks."""
    monkeypatch.setattr(head_module, "chunk_rows", lambda weight: 16)


@pytest.mark.parametrize("kind", [*IN_CHUNKS, *TRANSFORMED])
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_equal_those_of_full_logits(kind: str) -> None:
    model, batch = model_of(kind, **TRANSFORMED.get(kind, {})).eval(), batch_of()
    if kind in TRANSFORMED:
        model.get_output_embeddings().weight.data.mul_(5)  # so that caps bend the logits
    whole = gradients(model, batch, smoothing=0.1)
    said = use_chunked_loss(model, "chunked")
    assert said.startswith("in chunks of 16"), said
    assert ("logits times" in said) == (kind in TRANSFORMED), said
    chunked = gradients(model, batch, smoothing=0.1)
    assert whole.keys() == chunked.keys()
    size = 5 if kind in TRANSFORMED else 1
    torch.testing.assert_close(chunked, whole, rtol=2e-5, atol=2e-6 * size)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.usefixtures("small_chunks")
def test_a_step_of_several_batches_equals_full_logits(
    smoothing: float, tied: bool, trained: bool
) -> None:
    """One of them has no target token."""
    model = model_of("llama", tie_word_embeddings=tied)
    model.get_output_embeddings().weight.requires_grad_(trained)
    batches = batch_of(), batch_of(1, 8, targets=0), batch_of(3, 20, targets=60)
    whole = gradients(model, *batches, smoothing=smoothing)
    use_chunked_loss(model, "chunked")
    chunked = gradients(model, *batches, smoothing=smoothing)
    assert ("lm_head.weight" in chunked) == (trained and not tied)
    assert chunked["loss"][1] == 0
    torch.testing.assert_close(chunked, whole, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("small_chunks")
def test_a_head_with_bias_equals_full_logits() -> None:
    model = model_of("phi")
    assert model.get_output_embeddings().bias is not None
    whole = gradients(model, batch_of())
    use_chunked_loss(model, "chunked")
    torch.testing.assert_close(gradients(model, batch_of()), whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_chunks")
def test_half_precision_is_as_close_to_fp32_as_full_logits(dtype: torch.dtype) -> None:
    exact = gradients(model_of("llama"), batch_of())
    model = model_of("llama").to(dtype)
    whole = gradients(model, batch_of())
    use_chunked_loss(model, "chunked")
    chunked = gradients(model, batch_of())
    assert torch.allclose(chunked["loss"], whole["loss"], rtol=1e-6)
    for name, gradient in exact.items():
        apart = (whole[name] - gradient).norm(), (chunked[name] - gradient).norm()
        assert apart[1] <= 1.2 * apart[0] + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_many_chunks_are_summed_in_fp32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 chunks with similar gradients. In units of the dtype's epsilon, results differed by 0.2 to
    0.3; with sums in half precision they differed by 0.6 to 0.9."""
    monkeypatch.setattr(head_module, "chunk_rows", lambda weight: 8)
    dice = torch.manual_seed(0)
    head = nn.Linear(48, 64).to(dtype)
    head.__class__ = ChunkedCrossEntropyHead
    hidden = (torch.rand(1, 256, 48, generator=dice) + 0.5).to(dtype)
    ids = torch.randint(0, 64, (256,), generator=dice)
    targets = head_module.Targets(torch.arange(256), ids, torch.Size([1, 256]), 0.0)
    with head_module.loss_targets(targets):
        head(hidden).backward()
    exact = nn.Linear(48, 64).double()
    exact.load_state_dict(head.state_dict())
    nn.functional.cross_entropy(exact(hidden[0].double()), ids, reduction="sum").backward()
    for name, parameter in exact.named_parameters():
        found, expected = head.get_parameter(name).grad, parameter.grad
        assert found is not None
        assert expected is not None
        apart = (found - expected).norm() / expected.norm()
        assert apart < 0.5 * torch.finfo(dtype).eps, name


def test_fp16_gradients_are_scaled_before_they_are_rounded() -> None:
    """Gradients of 2⁻²⁷ underflow to zero in fp16, but not at a loss scale of 2¹⁶."""
    head = nn.Linear(4, 8, bias=False).half()
    head.__class__ = ChunkedCrossEntropyHead
    targets = head_module.Targets(torch.tensor([0]), torch.tensor([3]), torch.Size([1, 2]), 0.0)
    hidden, scale = torch.full((1, 2, 4), 2.0**-24, dtype=torch.float16), 2.0**16
    with head_module.loss_targets(targets):
        (head(hidden) * scale).backward()
    assert head.weight.grad is not None
    expected = torch.full((8, 4), 2.0**-27)  # all tokens are equally likely
    expected[3] -= 2.0**-24
    torch.testing.assert_close(head.weight.grad.float() / scale, expected, rtol=1e-3, atol=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if torch.is_tensor(each):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("choice", ["chunked", "whole"])
def test_no_tensor_has_the_size_of_all_logits(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "chunk_rows", lambda weight: 8)
    model, batch = model_of("llama"), batch_of(rows=4, length=32, targets=60)
    use_chunked_loss(model, choice)
    parameters = max(parameter.numel() for parameter in model.parameters())
    with Largest() as seen:
        gradients(model, batch)
    if choice == "chunked":
        assert seen.elements == parameters
    else:
        assert seen.elements == 4 * 32 * VOCABULARY > 2 * parameters


def test_evaluation_computes_no_gradient() -> None:
    model = model_of("llama").eval()
    whole = token_loss(model, batch_of())
    use_chunked_loss(model, "chunked")
    with torch.no_grad():
        loss = token_loss(model, batch_of())
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert model(input_ids=batch_of().input_ids).logits.shape == (2, 24, VOCABULARY)


def test_the_reason_for_full_logits_is_reported(tiny: Path, rows_file: Path) -> None:
    assert use_chunked_loss(model_of("gemma2"), "liger") == (
        "whole logits, because Gemma2ForCausalLM changes what its head returns"
    )
    said = use_chunked_loss(model_of("gemma2", final_logit_softcapping=3.0), "chunked")
    assert said == "in chunks of 4096 positions, logits times 1, capped at 3"
    assert use_chunked_loss(model_of("llama"), "whole").endswith("because training.loss=whole")
    for settings, kind in (
        ({"target_modules": ["lm_head"]}, "Linear"),
        ({"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
    ):
        untied = model_of("llama", tie_word_embeddings=False)
        method = Case(tiny, rows_file, method_options=settings).build_method()
        wrapped = method.prepare(untied, parts.SEED)
        line = use_chunked_loss(wrapped, "chunked")
        assert line == f"whole logits, because the head is a {kind}"
        assert token_loss(wrapped, batch_of()).item() > 0


def test_models_that_transform_logits_are_detected() -> None:
    def halves(model: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., :100]

    def in_place(model: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.mul_(2)

    def twice(model: Any, logits: torch.Tensor) -> torch.Tensor:
        model.lm_head(torch.zeros(1, 2, WIDTH))
        return logits

    for treat, reason in (
        (halves, "Treats computes with the logits (IndexError"),
        (in_place, "Treats changes what its head returns"),
        (twice, "Treats calls its head 2 times"),
    ):
        model = model_of("llama")

        class Treats(type(model)):  # type: ignore[misc]
            def forward(self, *args: Any, treat: Any = treat, **kwargs: Any) -> Any:
                found = super().forward(*args, **kwargs)
                found.logits = treat(self, found.logits)
                return found

        model.__class__ = Treats
        assert use_chunked_loss(model, "chunked").startswith(f"whole logits, because {reason}")
        assert type(model.get_output_embeddings()) is nn.Linear


def test_the_probe_does_not_change_the_model() -> None:
    model, before = model_of("llama"), copy.deepcopy(model_of("llama"))
    use_chunked_loss(model, "chunked")
    assert vars(model.model).keys() == vars(before.model).keys()
    assert vars(model.lm_head).keys() == vars(before.lm_head).keys()
    assert list(model.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize(
    ("vocabulary", "trained", "rows"),
    [(49152, False, 512), (128256, False, 256), (128256, True, 1024), (259, True, 4096),
     (10_000_000, False, 64)],
)  # fmt: skip
def test_chunks_take_about_128_mib(vocabulary: int, trained: bool, rows: int) -> None:
    weight = nn.Parameter(torch.empty(vocabulary, 8, device="meta"), requires_grad=trained)
    assert head_module.chunk_rows(weight) == rows
