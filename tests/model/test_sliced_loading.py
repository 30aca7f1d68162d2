"""Files with other tensors than in memory are read in slices, and as transformers reads them."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from launcher.config.schema.model import ModelConfig
from launcher.distributed.collectives import in_parts
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.io.weight_views import read_flat_range, read_full, read_into
from launcher.memory import load_and_save
from launcher.model import lazy_weight
from launcher.model.folder import SafetensorsFolder
from launcher.model.load import Weights, build_model, find_weights, model_on_meta
from launcher.strategy.fsdp_units import split_dim
from launcher.strategy.precision import precision_of
from launcher.strategy.zero_loading import partition_of
from launcher.training.build import assemble, new_strategy
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import QUESTION
from tests.helpers.parts import CPU, Case
from tests.helpers.stored_models import MODELS, Tensors, edit, publish


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Weights]:
    config = ModelConfig(name_or_path=str(folder), attention="eager")  # gpt-oss has no other
    model, weights = build_model(config, folder, 0, dtype)
    assert weights is not None
    assert all(parameter.is_meta for parameter in model.parameters())
    return model, weights


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_values_are_those_of_from_pretrained(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish(kind, tmp_path)
    expected, (model, weights) = reference(folder), load(folder)
    assert "every rank reads" not in capsys.readouterr().out
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert torch.equal(read_full(weights.folder[name]), parameter.detach()), name
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert buffer.dtype == buffers[name].dtype


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe", "granitemoehybrid"])
def test_all_ranks_together_read_each_byte_once(kind: str, ranks: int, tmp_path: Path) -> None:
    """Eight ranks have no expert each of five: the tensors are split along another dim."""
    _, weights = load(publish(kind, tmp_path))
    sizes = [each.source.shape.numel() * each.source.dtype.itemsize for each in weights.slots]
    before = weights.folder.bytes_read
    for slot in weights.slots:
        shape = slot.source.shape
        dim = split_dim(tuple(shape), ranks)
        share = -(-shape[dim] // ranks)
        boxes = []
        for rank in range(ranks):
            begin = min(rank * share, shape[dim])
            count = min(share, shape[dim] - begin)
            box = torch.empty(*shape[:dim], count, *shape[dim + 1 :])
            read_into(slot.source, box, tuple(begin * (axis == dim) for axis in range(box.ndim)))
            boxes.append(box)
        slot.full = torch.cat(boxes, dim)  # type: ignore[attr-defined]
    assert weights.folder.bytes_read - before == sum(sizes)
    for slot in weights.slots:  # zero3: any range of the flattened tensor
        info = [RankInfo(rank, rank, ranks, ranks, CPU) for rank in range(ranks)]
        ranges = [partition_of(slot.source.shape.numel(), each) for each in info]
        flat = torch.cat([read_flat_range(slot.source, *each) for each in ranges])
        assert torch.equal(flat, slot.full.flatten())  # type: ignore[attr-defined]
    assert weights.folder.bytes_read - before == 2 * sum(sizes)


def logits_and_bytes(rank_info: RankInfo, case: Case) -> tuple[torch.Tensor, int, int]:
    """Logits at step 0, bytes that this rank has read, and bytes of the parameters in the files."""
    config = case.config()
    compute = precision_of(config.precision).compute
    model, weights = build_model(config.model, case.model, parts.SEED, compute, in_parts=in_parts)
    assert weights is not None
    needed = sum(each.source.shape.numel() * each.source.dtype.itemsize for each in weights.slots)
    build = partial(new_strategy, config, rank_info)
    method = case.build_method()
    assembled = assemble(
        config, model, weights, method, build, rank_info.device, log=lambda line: None
    )
    return checkpoints.answer(assembled.strategy), weights.folder.bytes_read, needed


@pytest.mark.parametrize(
    ("kind", "strategy", "method", "ranks_", "precision"),
    [
        ("qwen3_5", "fsdp", "lora", 2, "bf16"),
        ("qwen3_5_moe", "zero3", "full", 2, "fp32"),
        ("qwen3_moe", "fsdp", "full", 4, "fp32"),
        ("deepseek_v3", "zero3", "lora", 3, "bf16"),
        pytest.param("gpt_oss", "fsdp", "lora", 3, "fp32", marks=pytest.mark.whole),
        pytest.param("qwen3_moe", "zero2", "full", 2, "fp32", marks=pytest.mark.whole),
        pytest.param("qwen3_5", "ddp", "lora", 2, "fp32", marks=pytest.mark.whole),
    ],
)
def test_logits_of_ranks_that_read_slices(
    ranks: Any,
    rows_file: Path,
    tmp_path: Path,
    kind: str,
    strategy: str,
    method: str,
    ranks_: int,
    precision: str,
) -> None:
    folder = publish(kind, tmp_path, torch.bfloat16)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with torch.no_grad():
        expected = reference(folder, dtype)(input_ids=QUESTION).logits
    case = Case(
        folder,
        rows_file,
        method=method,
        strategy=strategy,
        precision=precision,
        model_options={"attention": "eager"},
    )
    answers = ranks.run(ranks_, logits_and_bytes, case)
    for found, _, _ in answers:
        assert torch.equal(found, expected)
    read, needed = sum(read for _, read, _ in answers), answers[0][2]
    copies = 1 if strategy in ("fsdp", "zero3") else ranks_
    assert needed * copies <= read <= 1.05 * needed * copies


def test_parts_that_the_model_does_not_have_are_named_and_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def add_prediction_layer(tensors: Tensors) -> None:
        tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.ones(24, 32)

    _, weights = load(edit(publish("qwen3_5", tmp_path), add_prediction_layer))
    said = capsys.readouterr().out
    assert re.search(r"does not have them: model\.visual, mtp \(\d+ tensors, 0\.\d MB\)", said)
    for slot in weights.slots:
        read_full(slot.source)
    stored = sum(slot.source.shape.numel() for slot in weights.slots) * 4
    assert weights.folder.bytes_read == stored < weights.folder.nbytes


def test_a_buffer_that_needs_fp32_keeps_it_beside_bf16_weights(tmp_path: Path) -> None:
    def set_bias(tensors: Tensors) -> None:
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        tensors[name] = torch.full((5,), 1 + 2**-20)

    folder = edit(publish("deepseek_v3", tmp_path, torch.bfloat16), set_bias)
    model, _ = load(folder, torch.bfloat16)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert set(bias.tolist()) == {1 + 2**-20}


def test_fp32_values_among_bf16_are_exact_for_fp32_masters(tmp_path: Path) -> None:
    """transformers rounds them to the dtype that config.json names."""
    name = "model.layers.0.linear_attn.A_log"
    values = torch.tensor([1 + 2**-20, 2, 3, 4])

    def set_decay(tensors: Tensors) -> None:
        tensors[name.replace("model.", "model.language_model.", 1)] = values

    _, weights = load(edit(publish("qwen3_5", tmp_path, torch.bfloat16), set_decay))
    assert torch.equal(read_full(weights.folder[name]), values)


@pytest.mark.parametrize(
    ("kind", "lost", "named"),
    [
        ("qwen3_5", "model.language_model.norm.weight", r"contain no model\.norm\.weight"),
        (
            "deepseek_v3",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            r"contain no model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.3.down_proj.weight",
            r"experts\.down_proj has the shape \[4, 32, 16\].*describes \[5, 32, 16\]",
        ),
    ],
)
def test_lost_tensors_are_named(kind: str, lost: str, named: str, tmp_path: Path) -> None:
    folder = edit(publish(kind, tmp_path), lambda tensors: tensors.pop(lost))
    with pytest.raises(UserError, match=named):
        load(folder)


def test_a_tied_head_of_a_composite_that_differs_is_refused(tmp_path: Path) -> None:
    text = MODELS["qwen3_5"][1]["text_config"] | {"tie_word_embeddings": True}
    folder = publish("qwen3_5", tmp_path, text_config=text, tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(259, 32)}))
    with pytest.raises(
        UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        load(folder)


def test_no_byte_is_read_that_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the dtype and layout of the destination, and in however many tiles."""
    taken = 0

    def counted(descriptor: int, buffers: list[memoryview], begin: int) -> int:
        nonlocal taken
        taken += sum(map(len, buffers))
        return preadv(descriptor, buffers, begin)

    folder = publish("gpt_oss", tmp_path, torch.bfloat16)
    stored = SafetensorsFolder(folder)["model.layers.0.mlp.experts.down_proj"]  # [5, 24, 32]
    whole = read_full(stored)
    monkeypatch.setattr(lazy_weight, "TILE_BYTES", 100)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", counted)
    before = stored._file.bytes_read
    some, one, last = ((1, 3, 2), (3, 7, 20)), ((2, 0, 0), (1, 24, 32)), ((4, 23, 31), (1, 1, 1))
    for offsets, sizes in (some, one, last):
        box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        for out in (
            torch.empty(sizes, dtype=torch.bfloat16),
            torch.empty(sizes, dtype=torch.float32),
            torch.empty(sizes[::-1], dtype=torch.bfloat16).permute(2, 1, 0),
        ):
            taken = 0
            read_into(stored, out, offsets)
            assert torch.equal(out.to(torch.bfloat16), box)
            assert taken == box.nbytes == stored._file.bytes_read - before
            before = stored._file.bytes_read


def bytes_of_the_checks(rank_info: RankInfo, folder: Path) -> int:
    """Bytes that this rank has read before its strategy loads a shard."""
    config = ModelConfig(name_or_path=str(folder))
    _, weights = build_model(config, folder, 0, torch.float32, in_parts=in_parts)
    assert weights is not None
    return weights.folder.bytes_read


def test_ranks_compare_a_tied_head_with_the_embedding_together(ranks: Any, tmp_path: Path) -> None:
    text = MODELS["qwen3_5"][1]["text_config"] | {"tie_word_embeddings": True}
    folder = publish("qwen3_5", tmp_path, text_config=text, tie_word_embeddings=True)
    embedding = "model.language_model.embed_tokens.weight"
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    read = ranks.run(3, bytes_of_the_checks, folder)
    assert sum(read) == 2 * 259 * 32 * 4
    assert max(read) == 2 * 87 * 32 * 4


class Negate(ConversionOps):
    """What transformers might do to values one day."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {options["target_patterns"][0]: -next(iter(input_dict.values()))[0]}

    @property
    def reverse_op(self) -> Negate:
        return self


def test_what_computes_values_is_said_with_its_cost_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish("gpt2", tmp_path)
    asked = Case(folder, tmp_path, method="full").config()
    assert not load_and_save.reads_whole_model(asked, load(folder)[0])
    conversions = [WeightConverter(r"ln_f\.bias", "ln_f.bias", [Negate()])]
    monkeypatch.setitem(
        conversion_mapping._checkpoint_conversion_mapping_cache, "gpt2", conversions
    )
    assert load_and_save.reads_whole_model(asked, model_on_meta(asked.model, folder, torch.float32))
    model, weights = build_model(asked.model, folder, 0, torch.float32)
    assert weights is None
    assert not any(parameter.is_meta for parameter in model.parameters())
    said = capsys.readouterr().out
    assert re.search(
        r"made by Negate, cannot be read in slices; every rank reads .* 0\.\d MB", said
    )


def test_quantized_weights_are_left_to_transformers(tmp_path: Path) -> None:
    """A hub id can name such a model: the rules do not see its config."""
    folder = publish("qwen3_moe", tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))
    model = model_on_meta(ModelConfig(name_or_path=str(folder)), folder, torch.float32)
    found = find_weights(model, folder, SafetensorsFolder(folder), torch.float32)
    assert found.obstacle == "a model with quantized weights"


@pytest.mark.parametrize(("dtype", "is_said"), [(torch.bfloat16, True), (torch.float32, False)])
def test_parameters_that_lose_fp32_are_said(
    dtype: torch.dtype, is_said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(publish("ernie4_5_moe", tmp_path), dtype)
    sentence = "such as model.layers.1.mlp.gate.weight, in float32, and these ranks in bfloat16"
    assert (sentence in capsys.readouterr().out) is is_said


def test_the_model_keeps_its_parameters_while_their_sources_are_found(tmp_path: Path) -> None:
    model, _ = load(publish("qwen3_moe", tmp_path))
    assert {type(each) for each in model.parameters()} == {nn.Parameter}


def test_a_file_that_was_truncated_after_its_header_was_read_is_named(
    tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = SafetensorsFolder(tmp_path / "model")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{re.escape(str(file))} ends before byte \d+"):
        [read_full(tensors[name]) for name in tensors]
