"""One command converts any source to a loadable folder, or refuses and gives the reason."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from launcher.errors import UserError
from launcher.io.readers.safetensors_file import read_header
from launcher.model.tiny import make_tiny
from tests.helpers.exports import (
    consolidate,
    contents,
    make_adapter,
    merged_by_peft,
    plan_of,
    stored,
)

QUESTION = torch.arange(3, 60).view(1, -1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_folder_gives_the_outputs_of_base_plus_adapter(
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


def test_shards_stay_within_the_cap_and_the_index_is_correct(
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


def test_a_model_and_an_adapter_can_be_given_separately(tmp_path: Path, tiny: Path) -> None:
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
    with pytest.raises(UserError, match="needs a model folder"):
        plan_of(adapter, adapters=[adapter])
    with pytest.raises(UserError, match="is itself a model"):
        plan_of(tiny, base=str(tiny))
    with pytest.raises(UserError, match="--tag"):
        plan_of(tiny, tag="global_step3")
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint.parents[1] / "config.yaml").write_text("")
    (checkpoint / "manifest.json").write_text("{}")
    for source in (checkpoint, checkpoint.parents[1]):
        with pytest.raises(UserError, match="--tag 3 needs a DeepSpeed checkpoint as SOURCE, and"):
            plan_of(source, tag="3")
    for option in ("--tied=untie", "--qlora-base=dequantized"):
        with pytest.raises(UserError, match="needs an adapter"):
            consolidate(tiny, "--output", tmp_path / "out", option)


def test_two_adapters_on_a_module_are_summed(tmp_path: Path, tiny: Path) -> None:
    one = make_adapter(tiny, tmp_path / "one", target_modules=["q_proj", "v_proj"])
    two = make_adapter(tiny, tmp_path / "two", target_modules=["v_proj"], r=3)
    words = (tiny, "--adapter", one, "--adapter", two, "--dtype", "fp32")
    consolidate(*words, "--output", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for folder in (one, two):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    found = stored(tmp_path / "out")
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(found[name], tensor.data, rtol=0, atol=1e-6)
        assert torch.equal(found[name], tensor) or "v_proj" in name


def test_weights_of_gptq_are_only_copied(tmp_path: Path, tiny: Path) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (base / "config.json").write_text(json.dumps(config))
    packed = {"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 8, dtype=torch.int32)}
    save_file(stored(base) | packed, base / "model.safetensors", {"format": "pt"})
    for source in (base, make_adapter(tiny, tmp_path / "adapter")):
        where = {"base": str(base)} if source != base else {}
        with pytest.raises(UserError, match=r"quant_method gptq .* or --dtype base to copy"):
            plan_of(source, **where)
    consolidate(base, "--output", tmp_path / "out", "--dtype", "base")
    found, expected = stored(tmp_path / "out"), stored(base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "OFT"])
def test_an_adapter_that_is_not_lora_is_merged_by_peft(
    tmp_path: Path, tiny: Path, kind: str
) -> None:
    """The message names the call whose result is a source like any other."""
    settings = {"IA3": {"feedforward_modules": []}, "LoHa": {"r": 2}, "OFT": {"oft_block_size": 4}}
    config = getattr(peft, f"{kind}Config")(
        task_type="CAUSAL_LM", target_modules=["q_proj"], **settings[kind]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype="auto"), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
            assert "q_proj" in name
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"peft_type='{kind.upper()}'") as refusal:
        plan_of(tmp_path / "adapter")
    code = re.search(r"→ (peft\..+)$", str(refusal.value))
    assert code is not None
    places = {"ADAPTER": tmp_path / "adapter", "MODEL": tmp_path / "merged"}
    eval(code[1], {"peft": peft, **places})
    consolidate(tmp_path / "merged", "--output", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in stored(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_weights_are_cast_once(tmp_path: Path, tiny: Path, dtype: str) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(adapter, "--output", tmp_path / "out", "--dtype", dtype)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    found = stored(tmp_path / "out")
    for name, tensor in merged.named_parameters():
        assert torch.equal(found[name], tensor.to(wanted)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_values_that_do_not_fit_fp16_are_counted_and_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "made", tie=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    model.lm_head.weight.data[5, :3] = 1e6
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"lm_head\.weight: 3 value\(s\) .* --dtype bf16 or fp32"):
        consolidate(tmp_path / "base", "--output", tmp_path / "out", "--dtype", "fp16")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<extra-{n}>" for n in range(9)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(UserError, match=r"268 tokens, the embedding 259 rows"):
        plan_of(adapter)


def test_the_tokenizer_saved_by_training_is_used(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    consolidate(adapter, "--output", tmp_path / "out")
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.chat_template == tokenizer.chat_template
    assert "adapter_config.json" not in contents(tmp_path / "out")


def test_the_folder_contains_no_file_that_a_server_would_misread(
    tmp_path: Path, tiny: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    for stray in ("adapter_model.safetensors", "consolidated.00.pth", "optimizer.pt", "latest"):
        (base / stray).write_bytes(b"x")
    for stray in ("trainer_state.json", "training_args.bin", "zero_to_fp32.py"):
        (base / stray).write_bytes(b"x")
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(base, "--adapter", adapter, "--output", tmp_path / "out", "--max-shard-size", "1MB")
    found = contents(tmp_path / "out").keys()
    expected = {path.name for path in tiny.iterdir()} | {"consolidation_manifest.json"}
    assert found == expected
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"]


def test_an_adapter_can_be_extracted(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(adapter, "--adapter-only", "--output", tmp_path / "out")
    consolidate(adapter, "--adapter-only", "--dtype", "bf16", "--output", tmp_path / "bf16")
    assert {tensor.dtype for tensor in stored(tmp_path / "bf16").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    again = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    for name, tensor in merged_by_peft(tiny, adapter).items():
        assert torch.equal(again.get_parameter(name), tensor)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate(tiny, "--output", tmp_path / "out", "--dry-run")
    out = capsys.readouterr().out
    assert "20 tensors (20 copied)" in out
    for name, tensor in read_header(tiny / "model.safetensors").items():
        assert f"{name}  copied  bfloat16 {list(tensor.shape)}  {tensor.nbytes:,} bytes" in out
    assert "GB free in" in out
    assert not list(tmp_path.iterdir())


def test_the_result_can_be_printed_as_json(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate(tiny, "--output", tmp_path / "out", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == {
        "model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size
    }
    assert result["bytes"] == sum(t.nbytes for t in stored(tiny).values())


def test_an_ollama_modelfile_gives_the_same_text_as_the_chat_template(
    tmp_path: Path, tiny: Path
) -> None:
    consolidate(tiny, "--output", tmp_path / "out", "--modelfile")
    text = (tmp_path / "out" / "Modelfile").read_text()
    template = text.split('"""')[1]
    filled = template.replace("{{ if .System }}", "").replace("{{ if .Prompt }}", "")
    for key, value in (("System", "be brief"), ("Prompt", "why?"), ("Response", "so.")):
        filled = filled.replace(f"{{{{ .{key} }}}}", value)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert filled.replace("{{ end }}", "") == expected
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_hub_access_is_checked_before_anything_is_written(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match=r"--push-to-hub me/model: .*hf auth login"):
        consolidate(tiny, "--output", tmp_path / "out", "--push-to-hub", "me/model")
    assert not list(tmp_path.iterdir())


def test_a_modelfile_uses_the_template_of_the_exported_tokenizer(
    tmp_path: Path, tiny: Path
) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    consolidate(adapter, "--output", tmp_path / "out", "--modelfile")
    assert "<|im_start|>user" in (tmp_path / "out" / "Modelfile").read_text()


def test_the_files_of_two_tokenizers_are_not_mixed(tmp_path: Path, tiny: Path) -> None:
    """An older tokenizer has its template in its config; a template file of the base would win."""
    adapter = make_adapter(tiny, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink()
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings["chat_template"] = "OLD {{ messages[0].content }}"
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    consolidate(adapter, "--output", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.startswith("OLD")


def test_a_head_that_differs_from_the_embedding_is_marked_as_untied(tmp_path: Path) -> None:
    """If config.json does not contain the flag, each server would decide for itself."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40))
    model.save_pretrained(tmp_path / "made")
    base = tmp_path / "base"
    base.mkdir()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["wte"]))
    torch.nn.init.normal_(wrapped.base_model.model.transformer.wte.lora_embedding_A["default"])
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    consolidate(base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert not torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_weight_file_that_is_a_broken_link_is_named(tmp_path: Path, tiny: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"^.*/base/model\.safetensors .*No such file"):
        plan_of(base)


def test_an_interrupt_explains_how_to_resume(tmp_path: Path, tiny: Path) -> None:
    code = (
        "import os, signal, launcher.export.writing.write as w\n"
        "w.write_extra_files = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from launcher.commands.consolidate import main; main()"
    )
    words = [sys.executable, "-c", code, tiny, "--output", tmp_path / "out"]
    ended = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("Traceback")) == (130, 0)
    assert "--resume continues" in ended.stderr
    consolidate(tiny, "--output", tmp_path / "out", "--resume")


def test_every_adapter_tensor_must_find_its_weight(tmp_path: Path, tiny: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter")
    make_tiny(tmp_path / "other", layers=1)
    with pytest.raises(UserError, match=r"layers\.1\."):
        plan_of(adapter, base=str(tmp_path / "other"))
