"""What is exported is base + adapter to the bit, in files that others read, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.errors import UserError
from launcher.export import cli, lora, write
from launcher.export.plan import Plan, make_plan, parse_size
from launcher.export.safetensors_file import read_header
from launcher.export.source import find_source
from launcher.export.verify import verify
from launcher.model.tiny import make_tiny

QUESTION = torch.arange(3, 60).view(1, -1)


def make_adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A PEFT adapter whose both halves are random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.05
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(folder)
    return folder


def consolidate(*words: object) -> None:
    cli.consolidate(cli._parser().parse_args([str(word) for word in words]))


def plan_of(source: Path, size: str = "5GB", **options: Any) -> Plan:
    arguments = {"base": None, "adapter": None, **options}
    return make_plan(find_source(source, **arguments), parse_size(size))


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: p.detach() for name, p in merged.named_parameters()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 5, "r": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
        {"target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["plain", "rslora", "odd-scale", "patterns", "some-modules"],
)
def test_merged_weights_equal_peft_s_to_the_bit(
    tmp_path: Path, options: dict[str, Any], base_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    make_tiny(tmp_path / "made", tie=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=base_dtype)
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", adapter_dtype, **options)
    write.write(plan_of(adapter), tmp_path / "out")
    expected, found = merged_by_peft(tmp_path / "base", adapter), stored(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == base_dtype
        assert torch.equal(found[name], tensor), name


def test_tiles_give_the_bits_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    b, a = torch.randn(1000, 8), torch.randn(8, 300)
    whole = b @ a
    for rows in (64, 256, 999):
        monkeypatch.setattr(lora, "TILE_ROWS", rows)
        ranges = lora.tiles(1000)
        assert [first for first, _ in ranges[1:]] == [last for _, last in ranges[:-1]]
        assert (ranges[0][0], ranges[-1][1]) == (0, 1000)
        assert min(last - first for first, last in ranges) >= 64
        assert torch.equal(torch.cat([b[i:j] @ a for i, j in ranges]), whole)


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_folder_answers_as_base_plus_adapter(
    tmp_path: Path, tiny: Path, tiny_untied: Path, tied: bool
) -> None:
    base = tiny if tied else tiny_untied
    adapter = make_adapter(base, tmp_path / "adapter")
    consolidate(adapter, "--output", tmp_path / "out", "--max-shard-size", "30KB")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        found, expected = exported(QUESTION).logits, merged(QUESTION).logits
    assert torch.equal(found, expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_shards_keep_the_cap_and_the_index_tells_the_truth(
    tmp_path: Path, tiny_untied: Path
) -> None:
    consolidate(tiny_untied, "--output", tmp_path / "out", "--max-shard-size", "20KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = read_header(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000 or len(tensors) == 1, "only one larger tensor may pass the cap"
        assert (file.stat().st_size - size) % 4096 == 0, "data begin at a page"
        assert file.stat().st_mode & 0o777 == (tmp_path / "out/config.json").stat().st_mode & 0o777
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_untied, dtype="auto")
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert index["metadata"]["total_size"] == 2 * model.num_parameters()
    again = stored(tmp_path / "out")
    assert index["weight_map"].keys() == again.keys()
    for name, tensor in stored(tiny_untied).items():
        assert torch.equal(again[name], tensor), "untouched tensors are copied"


def test_one_file_has_no_index(tmp_path: Path, tiny: Path) -> None:
    consolidate(tiny, "--output", tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_a_model_and_an_adapter_can_be_named_apart(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(adapter, "--output", tmp_path / "one")
    consolidate(tiny, "--adapter", adapter, "--output", tmp_path / "two")
    consolidate(adapter, "--base", tiny, "--output", tmp_path / "three")
    files = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")
    ]
    assert files[0] == files[1] == files[2]
    assert files[0] != (tiny / "model.safetensors").read_bytes()


def test_options_that_would_be_ignored_are_refused(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    with pytest.raises(UserError, match="goes with a model folder"):
        plan_of(adapter, adapter=adapter)
    with pytest.raises(UserError, match="is a model itself"):
        plan_of(tiny, base=str(tiny))


def test_a_quantised_base_is_refused(tmp_path: Path, tiny: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised \(fp8\)"):
        plan_of(adapter)


def test_a_dry_run_writes_nothing(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate(tiny, "--output", tmp_path / "out", "--dry-run")
    assert "20 tensors (20 copied)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "ADALORA"},
        {"alora_invocation_tokens": [1]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["x"]},
        {"fan_in_fan_out": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_adapters_beyond_plain_lora_are_refused_by_name(
    tmp_path: Path, tiny: Path, changes: dict[str, Any]
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    edit_config(adapter, **changes)
    with pytest.raises(UserError, match=next(iter(changes))):
        plan_of(adapter)


def test_every_adapter_tensor_must_find_its_weight(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    other = tmp_path / "other"
    make_tiny(other, layers=1)
    with pytest.raises(UserError, match=r"layers\.1\..* is in no file of the base model"):
        plan_of(adapter, base=str(other))
    edit_config(adapter, r=5)
    with pytest.raises(UserError, match="do not fit rank 5"):
        plan_of(adapter)


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.lora_A.weight"] = torch.zeros(4, 48)
    tensors["base_model.model.model.embed_tokens.lora_B.weight"] = torch.zeros(259, 4)
    save_file(tensors, file)
    with pytest.raises(UserError, match="tied"):
        plan_of(adapter)


def test_nothing_is_overwritten(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").mkdir()
    consolidate(tiny, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        consolidate(tiny, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not empty"):
        consolidate(tiny, "--output", tmp_path / "out" / "config.json")


def test_a_failure_leaves_nothing(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_write_index", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        consolidate(tiny, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_first(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* GB"):
        consolidate(tiny, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("100MB", 10**8), ("1.5 kb", 1500), ("2GiB", 2 * 2**30), ("77", 77)],
)
def test_sizes_are_decimal_unless_written_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5XB", "5 G B"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("what", ["nothing", "file"])
def test_a_source_that_is_none_is_refused(tmp_path: Path, what: str) -> None:
    source = tmp_path / "source"
    if what == "file":
        source.write_text("")
    else:
        source.mkdir()
    with pytest.raises(UserError, match="SOURCE"):
        find_source(source, None, None)


class TestVerify:
    @pytest.fixture
    def exported(self, tmp_path: Path, tiny_untied: Path) -> Path:
        consolidate(tiny_untied, "--output", tmp_path / "out", "--max-shard-size", "40KB")
        return tmp_path / "out"

    def test_a_whole_folder_passes(self, exported: Path) -> None:
        assert "whole. 21 tensors" in verify(exported)

    def test_one_flipped_bit_is_found(self, exported: Path) -> None:
        file = sorted(exported.glob("*.safetensors"))[1]
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"{file.name} has another content"):
            verify(exported)

    def test_a_cut_file_is_found(self, exported: Path) -> None:
        file = sorted(exported.glob("*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(UserError, match=f"{file.name} has"):
            verify(exported)

    def test_a_missing_file_is_found(self, exported: Path) -> None:
        (exported / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
            verify(exported)

    def test_a_stray_shard_is_found(self, exported: Path) -> None:
        shutil.copy(sorted(exported.glob("*.safetensors"))[0], exported / "extra.safetensors")
        with pytest.raises(UserError, match=r"extra\.safetensors"):
            verify(exported)

    def test_a_folder_without_manifest_is_told(self, tiny: Path) -> None:
        with pytest.raises(UserError, match="was it written by shardway consolidate"):
            verify(tiny)


def test_a_damaged_safetensors_file_is_named(tmp_path: Path, tiny: Path) -> None:
    content = (tiny / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for damaged in (content[:-7], content + b"x", content[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_header(file)
