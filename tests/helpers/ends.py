"""Tokenizers and models whose answers end in a token of a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launcher.folders import manifest
from launcher.folders.checkpoint import ADAPTER, MANIFEST
from launcher.io.answer_end import end_tokens
from launcher.model.tiny import byte_tokenizer
from launcher.model.tokenizer import load_tokenizer, trained_files
from tests.helpers.exports import make_adapter

EOS, START, END = 0, 1, 2  # <|endoftext|>, <|im_start|>, <|im_end|>
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def tokenizer_with(
    template: str, special: tuple[str, ...] = (), added: tuple[str, ...] = (), **roles: str
) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose EOS token is <|endoftext|>, with more tokens and a template."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokens = [AddedToken(text, special=True, normalized=False) for text in special]
    tokens += [AddedToken(text, special=False, normalized=False) for text in added]
    tokenizer.add_tokens(tokens)
    for role, text in roles.items():
        setattr(tokenizer, role, text)
    tokenizer.chat_template = template
    return tokenizer


def make_base(folder: Path, end: int = END, template: str | None = None, **config: Any) -> Path:
    """A base model with EOS <|endoftext|>, its tokenizer in the form of transformers 4.57.

    Its weights write "h" and the token `end` in turn, without an end.
    """
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    settings = {"eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None, **config}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **settings,
        )
    )
    letter = tokenizer.convert_tokens_to_ids("h")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for matrix in (model.model.embed_tokens.weight, model.lm_head.weight):
            matrix.zero_()
        model.model.embed_tokens.weight[:, 0] = 1  # after every token but "h" comes "h"
        model.model.embed_tokens.weight[letter, :2] = torch.tensor([0.0, 1.0])
        model.lm_head.weight[letter, 0] = model.lm_head.weight[end, 1] = 1
    model.to(torch.bfloat16).save_pretrained(folder)
    _write_tokenizer(folder, template)
    return folder


def _write_tokenizer(folder: Path, template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    decoder = {
        str(number): {"content": name, **FLAGS, "special": True}
        for number, name in enumerate(names)
    }
    settings = {
        "added_tokens_decoder": decoder,
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "eos_token": names[EOS],
        "model_max_length": 512,
        "pad_token": names[EOS],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = {"eos_token": {"content": names[EOS], **FLAGS}, "pad_token": names[EOS]}
    for name, content in [("tokenizer_config", settings), ("special_tokens_map", special)]:
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def make_checkpoint(base: Path, folder: Path, template: str | None) -> Path:
    """What a run with data.template=`template` saves: an adapter that changes nothing, and the
    tokenizer."""
    make_adapter(base, folder / ADAPTER, noise=0.0)
    tokenizer = load_tokenizer(base, False, True, template)
    if template is not None:
        for name, content in trained_files(base, tokenizer).items():
            (folder / name).write_bytes(content)
    (folder / "trainer.json").write_text("{}")
    (folder / "config.yaml").write_text("model: {}\n")
    said: dict[str, Any] = {
        "step": 2,
        "content": "all",
        "base": {"name_or_path": str(base), "revision": None},
        "end_tokens": end_tokens(tokenizer),
    }
    manifest.write(folder / MANIFEST, said)
    return folder
