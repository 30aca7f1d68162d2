"""Loading slices into a model on meta gives the same model as `from_pretrained`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
)

from launcher.config.schema.model import ModelConfig
from launcher.distributed.collectives import in_parts
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.model.attention import CAUSAL, MASKLESS_MODEL_TYPES, choose_attention
from launcher.model.folder import SafetensorsFolder
from launcher.model.load import build_model
from launcher.model.tiny import byte_tokenizer, make_tiny
from launcher.strategy.precision import precision_of
from launcher.training.build import assemble, new_strategy
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import QUESTION
from tests.helpers.parts import Case


def logits(rank_info: RankInfo, case: Case) -> torch.Tensor:
    """Logits at step 0, with the trained parameters attached."""
    return checkpoints.answer(parts.set_up(rank_info, case)[0].strategy)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    ("strategy", "world"),
    [
        ("single", 1),
        ("ddp", 2),
        ("fsdp", 2),
        ("fsdp", 3),
        ("zero1", 2),
        ("zero2", 2),
        ("zero3", 2),
        ("zero3", 3),
    ],
)
def test_logits_equal_from_pretrained_to_the_bit(
    ranks: Any,
    tiny: Path,
    tiny_untied: Path,
    rows_file: Path,
    tied: bool,
    method: str,
    strategy: str,
    world: int,
) -> None:
    folder = tiny if tied else tiny_untied
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=QUESTION).logits
    case = Case(folder, rows_file, method=method, strategy=strategy)
    for found in ranks.run(world, logits, case):
        assert torch.equal(found, expected)


def test_bf16_logits_equal_from_pretrained_to_the_bit(
    ranks: Any, tiny: Path, rows_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = model(input_ids=QUESTION).logits
    for found in ranks.run(2, logits, Case(tiny, rows_file, precision="bf16")):
        assert torch.equal(found, expected)


def test_no_parameter_is_real_before_it_is_sharded(tiny: Path) -> None:
    model, weights = build_model(
        ModelConfig(name_or_path=str(tiny)), tiny, seed=0, dtype=torch.float32
    )
    assert weights is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


def bytes_read(rank_info: RankInfo, case: Case) -> tuple[int, int]:
    """Bytes read by this rank, and bytes of all weights."""
    config = case.config()
    compute = precision_of(config.precision).compute
    model, weights = build_model(config.model, case.model, parts.SEED, compute, in_parts=in_parts)
    assert weights is not None
    whole = sum(slot.source.shape.numel() for slot in weights.slots)
    build = partial(new_strategy, config, rank_info)
    assemble(
        config, model, weights, case.build_method(), build, rank_info.device, log=lambda line: None
    )
    return weights.folder.bytes_read, whole * torch.bfloat16.itemsize


PARTS = [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("zero3", 3)]
READERS = [(method, *each) for method in ("full", "freeze", "lora", "qlora") for each in PARTS]


@pytest.mark.parametrize(("method", "strategy", "world"), [*READERS, ("qlora", "fsdp", 4)])
def test_a_rank_reads_only_its_own_part(
    ranks: Any, tiny: Path, rows_file: Path, method: str, strategy: str, world: int
) -> None:
    """A quantized base is read twice, the first time for its scales."""
    case = Case(tiny, rows_file, method=method, strategy=strategy, precision="bf16")
    answers = ranks.run(world, bytes_read, case)
    (whole,) = {whole for _, whole in answers}
    shards = 1 if strategy == "ddp" else world
    for found, _ in answers:
        assert found <= 1.1 * whole * ((method == "qlora") / world + 1 / shards)
    # zero3 keeps a full row if a partition starts or ends within it
    assert sum(found for found, _ in answers) >= whole * (1 if shards > 1 else world)


def test_sharded_files_with_an_index_can_be_loaded(
    ranks: Any, tiny_untied: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    model.save_pretrained(tmp_path / "split", max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    with torch.no_grad():
        expected = model.float().eval()(input_ids=QUESTION).logits
    assert torch.equal(ranks.run(2, logits, Case(tmp_path / "split", rows_file))[0], expected)


def test_the_config_of_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_tiny(folder)
    (folder / "config.json").write_text("{")
    message = rf"^model\.name_or_path={folder} cannot be read: .*/config\.json cannot be read"
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(name_or_path=str(folder)), folder, seed=0, dtype=torch.float32)


def test_an_index_that_lists_a_missing_file_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    LlamaConfig.from_pretrained(tiny).save_pretrained(folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-00001-of-00002"):
        build_model(ModelConfig(name_or_path=str(folder)), folder, seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "maskless"),
    [
        (LlamaConfig(), True),
        (Qwen2Config(use_sliding_window=False, sliding_window=4096), True),
        (MistralConfig(sliding_window=64), False),
        (Gemma3TextConfig(), False),
        (BloomConfig(), False),
        (FalconConfig(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_models_that_attend_to_all_earlier_tokens_use_no_mask(
    config: Any, maskless: bool
) -> None:
    assert (choose_attention("sdpa", config) == CAUSAL) is maskless
    assert choose_attention("eager", config) == "eager"


@pytest.mark.parametrize("model_type", MASKLESS_MODEL_TYPES)
def test_omitting_the_mask_is_exact_to_the_bit(model_type: str) -> None:
    """Every architecture on the list, against transformers' own sdpa."""
    config = AutoConfig.for_model(
        model_type, vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=None,
    )  # fmt: skip
    assert choose_attention("sdpa", config) == CAUSAL
    found = []
    for attention in (CAUSAL, "sdpa"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            found.append(model(input_ids=QUESTION, use_cache=False).logits)
    assert torch.equal(*found)


def test_a_sliding_window_is_kept(ranks: Any, rows_file: Path, tmp_path: Path) -> None:
    """The window is shorter than the question: without its mask the logits would differ."""
    folder = tmp_path / "mistral"
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=QUESTION).logits
    for found in ranks.run(2, logits, Case(folder, rows_file)):
        assert torch.equal(found, expected)


def test_several_weight_files_without_an_index_are_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "two")
    (tmp_path / "two/model.safetensors").rename(tmp_path / "two/a.safetensors")
    shutil.copy(tmp_path / "two/a.safetensors", tmp_path / "two/b.safetensors")
    with pytest.raises(UserError, match="2 safetensors files and no"):
        SafetensorsFolder(tmp_path / "two")
    (tmp_path / "two/a.safetensors").rename(tmp_path / "two/model.safetensors")
    assert "model.norm.weight" in SafetensorsFolder(tmp_path / "two")


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (["q_proj", "nothing"], "no module is named nothing"),
        (["all-linear", "q_proj"], "all-linear cannot be combined"),
        (["embed_tokens"], "embeddings cannot be adapted"),
        (["lm_head"], "lm_head is tied"),
    ],
)
def test_target_modules_that_would_be_ignored_or_lost_are_refused(
    tiny: Path, rows_file: Path, targets: list[str], sentence: str
) -> None:
    case = Case(tiny, rows_file, method_options={"target_modules": targets})
    with pytest.raises(UserError, match=sentence):
        parts.plain_model(case)


def test_an_unavailable_attention_is_refused(tiny: Path) -> None:
    """For a hub id, the rule table does not know the architecture."""
    config = ModelConfig(name_or_path=str(tiny), attention="flash_attention_2")
    with pytest.raises(UserError, match=r"with model.attention=flash_attention_2 cannot be built"):
        build_model(config, tiny, seed=0, dtype=torch.bfloat16)
