"""The gathered weights are the trained weights, and other libraries can load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.distributed.gather import gather_to_main
from launcher.distributed.process_group import RankInfo
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.io.readers.dcp import read_model
from tests.helpers import checkpoints, parts
from tests.helpers.checkpoints import QUESTION, save_and_answer
from tests.helpers.layouts import ONE_OF_EACH
from tests.helpers.parts import Case


def count_messages(rank_info: RankInfo, case: Case) -> list[int]:
    """The bytes of each message that this rank sends in one gather of the trained parameters."""
    strategy = parts.set_up(rank_info, case)[0].strategy
    sent: list[int] = []
    original = dist.send

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "send", counted)
        gather_to_main(strategy.weights())
    return sent


@pytest.mark.parametrize(("strategy", "world", "options"), ONE_OF_EACH)
def test_gathered_adapter_gives_the_live_logits_in_peft(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int, options: Any
) -> None:
    case = Case(
        tiny, rows_file, strategy=strategy, strategy_options=options, steps=4,
        learning_rate=1e-2, global_batch_size=12,
    )  # fmt: skip
    live = ranks.run(world, save_and_answer, case, tmp_path)[0]
    saved = tmp_path / "checkpoints/step-000004"
    assert not list((tmp_path / "checkpoints").glob(".*")), "nothing is left aside"
    assert manifest.check(saved / "manifest.json")["step"] == 4
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=QUESTION).logits
        after = PeftModel.from_pretrained(base, saved / "adapter")(input_ids=QUESTION).logits
    torch.testing.assert_close(after, live, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3, "the adapter must do something"


@pytest.mark.parametrize(("strategy", "share"), [("fsdp", 2), ("zero1", 2), ("ddp", 0)])
def test_gathering_sends_each_part_of_the_adapter_once_and_not_the_model(
    ranks: Any, tiny: Path, rows_file: Path, strategy: str, share: int
) -> None:
    main, other = ranks.run(2, count_messages, Case(tiny, rows_file, strategy=strategy))
    assert main == [], "what rank 0 has is not sent"
    if not share:
        assert other == []
        return
    model = parts.plain_model(Case(tiny, rows_file))
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    (message,) = other
    assert 0 <= message - sum(trained) / share <= 16 * len(trained)


@pytest.mark.parametrize(("strategy", "world", "options"), ONE_OF_EACH)
def test_full_run_writes_dcp_shards_that_read_back(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, strategy: str, world: int, options: Any
) -> None:
    case = Case(
        tiny, rows_file, method="full", strategy=strategy, strategy_options=options, steps=3,
        global_batch_size=12,
    )  # fmt: skip
    live = ranks.run(world, save_and_answer, case, tmp_path)[0]
    tensors = read_model(tmp_path / "checkpoints/step-000003" / "model").tensors
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert tensors.keys() == dict(model.named_parameters()).keys(), "tied weights stand once"
    model.load_state_dict({name: t.read_all() for name, t in tensors.items()}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=QUESTION).logits, live, rtol=1e-5, atol=1e-5)
    if strategy in ("fsdp", "zero1", "zero2", "zero3"):
        files = list((tmp_path / "checkpoints/step-000003" / "model").glob("*.distcp"))
        assert len(files) == world, "every rank writes its own shard"


def refused_for_space(rank_info: RankInfo, case: Case, folder: Path, content: str) -> list[str]:
    """The report before training if one byte too few is free, and if enough are free."""
    train_state, _ = parts.set_up(rank_info, case)
    saver = checkpoints.saver(train_state, case.config(), folder, content=content)
    tensors = 3 if content == "all" else 1
    needed = tensors * sum(shard.nbytes for shard in train_state.strategy.weights().values())
    said = []
    for free in (needed - 1, 2 * needed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            try:
                saver.check_space()
            except UserError as error:
                said.append(str(error))
    return [*said, f"rank 0: a checkpoint of {needed / 1e6:,.1f} MB does not fit on the disk of "]


@pytest.mark.parametrize("content", ["all", "weights"])
def test_the_first_checkpoint_needs_space_for_weights_and_two_moments_or_only_weights(
    ranks: Any, tiny: Path, rows_file: Path, tmp_path: Path, content: str
) -> None:
    case = Case(tiny, rows_file, method="full", strategy="fsdp")
    for said, expected in ranks.run(2, refused_for_space, case, tmp_path, content):
        assert said.startswith(expected)


def test_a_missing_adapter_tensor_is_refused(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    case = Case(tiny, rows_file)
    model, method = parts.plain_model(case), case.build_method()
    whole = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    name = next(iter(whole))
    for broken in ({**whole, name: torch.empty(0)}, {n: t for n, t in whole.items() if n != name}):
        with pytest.raises(RuntimeError, match="lora_A"):
            method.write(model, broken, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_adapter_folder_names_its_base(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    case = Case(tiny, rows_file, method_options={"alpha": 3.0, "rslora": True})
    model = parts.plain_model(case)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    case.build_method().write(model, trained, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 3.0, True)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == len(trained)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o044
