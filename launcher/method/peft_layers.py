"""Add PEFT's layers to a model: those of a new adapter, or of an existing one."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from pathlib import Path

from torch import nn

from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.io.module_paths import ends_in
from launcher.method import existing_adapter
from launcher.method.peft_tensors import ADAPTER_NAME
from launcher.method.targets import (
    Targets,
    check_experts,
    find_targets,
    from_portable,
    shorten,
)
from launcher.model.adaptable import unadaptable_linears
from launcher.model.peft import (
    LoraLayer,
    ParamWrapper,
    PeftConfig,
    PeftModel,
    get_peft_model,
    keep_target_names,
)
from launcher.model.sparse import is_grouped, sparse_blocks
from launcher.model.text_part import is_within, non_text_paths, refuse_non_text


def wrap_new(model: nn.Module, config: LoraConfig, keep_tie: bool) -> PeftModel:
    """`model` with the layers of a new adapter. `keep_tie`: see `Lora`.

    Raises UserError if the settings do not fit the model.
    """
    targets, is_all = config.target_modules, config.target_modules == ["all-linear"]
    if "all-linear" in targets and len(targets) > 1:
        raise UserError(
            f"method.target_modules={targets}: all-linear cannot be combined with other names"
        )
    non_text, unadaptable = non_text_paths(model), unadaptable_linears(model)
    _refuse_ineffective(model, targets, non_text, unadaptable)
    saved = _saved_modules(model, config.modules_to_save, non_text)
    sparse = find_targets(model, targets, config.target_router, config.modules_to_save, non_text)
    peft_config = PeftConfig(
        r=config.rank,
        lora_alpha=config.resolved_alpha(),
        lora_dropout=config.dropout,
        target_modules="all-linear" if is_all else targets,
        exclude_modules=_excluded(model, targets, non_text, unadaptable) or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=config.resolved_alpha_pattern(),
        modules_to_save=saved or None,
        ensure_weight_tying=keep_tie,
        task_type="CAUSAL_LM",
    )
    if sparse is not None:
        _check_stacks(model, config, sparse)
        peft_config.target_modules = set(sparse.modules)
        peft_config.target_parameters = shorten(model, sparse.parameters) or None
    wrapped = _wrap(model, peft_config, config, sparse is not None)
    _check_targets(wrapped, targets, sparse)
    _check_patterns(wrapped, config)
    return wrapped


def _refuse_ineffective(
    model: nn.Module, targets: list[str], non_text: list[str], unadaptable: list[str]
) -> None:
    """Raises UserError for a name whose adapters would not learn: of modules that text does not
    reach, or that are passed by."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        found = [name for name in names if ends_in(name, target)]
        if passed := next((name for name in found if name in unadaptable), None):
            raise UserError(
                f"method.target_modules: {type(model).__name__} computes with the weight of "
                f"{passed} without calling it as a linear layer, so an adapter of {target} would "
                "have no effect → leave it out, or all-linear"
            )
        refuse_non_text("method.target_modules", target, found, non_text)


def _saved_modules(model: nn.Module, wanted: list[str], non_text: list[str]) -> list[str]:
    """`wanted`, modules to train in full, with a name that is also one of a module that text does
    not reach replaced by the paths of the others. Raises UserError for a name of such modules
    alone."""
    names = [name for name, _ in model.named_modules()]
    saved: list[str] = []
    for each in wanted:
        found = [name for name in names if name.endswith(each)]  # as PEFT compares them
        refuse_non_text("method.modules_to_save", each, found, non_text)
        text = [name for name in found if not is_within(name, non_text)]
        saved += [each] if text == found else text
    return saved


def _excluded(
    model: nn.Module, targets: list[str], non_text: list[str], unadaptable: list[str]
) -> list[str]:
    """The modules among `targets` that get no adapter: those that text does not reach, and, of
    all-linear, those that an adapter would break or that would pass it by."""
    is_all = targets == ["all-linear"]
    inside = [
        name
        for name, module in model.named_modules()
        if is_within(name, non_text)
        and (isinstance(module, nn.Linear) if is_all else any(ends_in(name, t) for t in targets))
    ]
    return [*(unadaptable if is_all else []), *inside]


def wrap_existing(model: nn.Module, config: LoraConfig, folder: Path) -> PeftModel:
    """`model` with the layers of the adapter in `folder`. Raises UserError if it does not fit."""
    peft_config = PeftConfig.from_pretrained(folder)
    peft_config.inference_mode, peft_config.lora_dropout = False, config.dropout
    peft_config.base_model_name_or_path = None  # PEFT sets it to the base of this run
    peft_config.init_lora_weights = True
    peft_config = existing_adapter.for_model(peft_config, model, str(folder))
    has_new_names = bool(peft_config.target_parameters)
    if has_new_names:
        from_portable(peft_config, model)
    return _wrap(model, peft_config, config, has_new_names)


def _wrap(
    model: nn.Module, peft_config: PeftConfig, config: LoraConfig, has_new_names: bool
) -> PeftModel:
    # PEFT refuses dropout before target parameters, for which `launcher.method.expert_lora` has it.
    dropout = peft_config.lora_dropout if peft_config.target_parameters else 0.0
    if dropout:
        peft_config.lora_dropout = 0.0
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            # Export unties tied weights if they differ.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            if has_new_names:
                stack.enter_context(keep_target_names())
            wrapped = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"method.target_modules={config.target_modules}: {error}") from error
    if dropout:
        _add_dropout(wrapped, dropout)
    return wrapped


def _add_dropout(model: PeftModel, dropout: float) -> None:
    """Raises UserError for experts that cannot have it. Adapters of routers get none."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer, ParamWrapper):
            if layer.num_experts == 1:
                continue
            experts = layer.get_base_layer()
            if not is_grouped(experts):
                raise UserError(
                    f"method.dropout={dropout} with adapters of experts ({name}): "
                    f"{type(experts).__name__} compute in their own way → method.dropout=0, or "
                    "method.target_modules=[q_proj,k_proj,v_proj,o_proj]"
                )
        layer.lora_dropout[ADAPTER_NAME] = nn.Dropout(dropout)


def _check_stacks(model: nn.Module, config: LoraConfig, targets: Targets) -> None:
    """Raises UserError for settings that do not apply to stacks of experts."""
    refused = {}
    if config.dora:
        refused["method.dora=true"] = "DoRA needs the norm of each expert's weight plus adapter"
    if config.pissa:
        refused["method.pissa=true"] = "PiSSA decomposes linear layers"
    if config.merge_first:
        refused[f"method.merge_first={config.merge_first}"] = (
            "an adapter of experts cannot store merged adapters"
        )
    check_experts(sparse_blocks(model), targets.parameters, refused)


def _check_patterns(model: PeftModel, config: LoraConfig) -> None:
    """Every pattern must match a module or a stack of experts with an adapter."""
    base = model.base_model
    adapted = [*base.targeted_module_names, *base.targeted_parameter_names]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(f"method.{key}: no adapted module is named {pattern}")


def _check_targets(model: PeftModel, targets: list[str], sparse: Targets | None) -> None:
    """Every entry must match a module, and export must be able to merge every match."""
    adapted = model.base_model.targeted_module_names
    for target in targets if sparse is None else ():
        matches = [name for name in adapted if ends_in(name, target)]
        if target != "all-linear" and not matches:
            raise UserError(f"method.target_modules: no module is named {target}")
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Embedding):
            raise UserError(f"method.target_modules={targets}: embeddings cannot be adapted yet")
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and any(name.endswith("lm_head") for name in adapted):
        raise UserError(
            f"method.target_modules={targets}: lm_head is tied to the embedding, which an adapter "
            "would change too; leave it out"
        )
