"""Which parts of a mixture of experts get an adapter, and how adapter_config.json names them.

transformers keeps the experts of a layer in stacks, parameters of three dims, and routers in
classes of their own; PEFT adapts both by `target_parameters`. PEFT also renames the targets of
adapters that were made with transformers 4, where every expert and router was a linear layer. For
some model types it therefore mistakes a linear layer of a shared expert for the experts; such a
layer is written as a target parameter too, which gives the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from launcher.errors import UserError
from launcher.io.adapter_config import module_value
from launcher.io.module_paths import ends_in
from launcher.model.peft import PeftConfig, linear_layers, renamed_targets
from launcher.model.sparse import SparseBlock, sparse_blocks
from launcher.model.text_part import is_within

PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass(frozen=True)
class Targets:
    """Paths in the base."""

    modules: list[str]
    parameters: list[str]


def find_targets(
    model: nn.Module,
    wanted: list[str],
    target_router: bool,
    modules_to_save: list[str],
    non_text: list[str],
) -> Targets | None:
    """What `method.target_modules` selects in a mixture of experts; None for other models, in which
    PEFT finds it. Modules that are trained in full, and those in `non_text`, get no adapter.

    Raises UserError for a name that matches nothing, and for a router that is not asked for.
    """
    blocks = sparse_blocks(model)
    if not blocks:
        if target_router:
            raise UserError(
                f"method.target_router=true, but {type(model).__name__} has no router of experts "
                "→ method.target_router=false"
            )
        return None
    routers = {path: router for block in blocks for path, router in block.routers.items()}
    inside = tuple(f"{path}." for path in routers)
    linear = [
        name for name in linear_layers(model) if name not in routers and not name.startswith(inside)
    ]
    stacks = [path for block in blocks for path in block.stack_paths()]
    if wanted == ["all-linear"]:
        modules, parameters = linear, stacks
    else:
        modules, parameters = _select(model, wanted, routers, linear, stacks)
    if target_router:
        router_modules, router_parameters = _router_targets(routers)
        modules, parameters = modules + router_modules, parameters + router_parameters
    modules = [name for name in modules if not is_within(name, non_text)]
    return Targets(_outside(modules, modules_to_save), _outside(parameters, modules_to_save))


def _select(
    model: nn.Module,
    wanted: list[str],
    routers: Collection[str],
    linear: list[str],
    stacks: list[str],
) -> tuple[list[str], list[str]]:
    modules: list[str] = []
    parameters: list[str] = []
    names = [name for name, _ in model.named_modules() if name]
    for target in wanted:
        found = [name for name in names if ends_in(name, target)]
        if any(name in routers for name in found):
            raise UserError(
                f"method.target_modules: {target} is the router of experts; leave it out, and set "
                "method.target_router=true to adapt it"
            )
        in_stacks = [path for path in stacks if ends_in(path, target)]
        if not found and not in_stacks:
            known = sorted({path.rpartition(".")[2] for path in (*linear, *stacks)})
            raise UserError(
                f"method.target_modules: no module is named {target}; {type(model).__name__} has "
                f"{', '.join(known)}"
            )
        modules, parameters = modules + found, parameters + in_stacks
    return modules, parameters


def _router_targets(routers: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """(linear layers, parameters) of the routers. A router that is a subclass of a linear layer
    does more than multiply, so its weight is adapted."""
    modules, parameters = [], []
    for path, router in routers.items():
        for name, module in router.named_modules(prefix=path):
            weight = getattr(module, "weight", None)
            if type(module) is nn.Linear:
                modules.append(name)
            elif isinstance(weight, nn.Parameter) and weight.ndim == 2:
                parameters.append(f"{name}.weight")
    return modules, parameters


def _outside(paths: Iterable[str], modules_to_save: list[str]) -> list[str]:
    """Those of `paths` that are in none of `modules_to_save`."""
    return [
        path for path in paths if not any(f".{saved}." in f".{path}." for saved in modules_to_save)
    ]


def shorten(model: nn.Module, parameters: list[str]) -> list[str]:
    """The shortest names of two or more parts that select `parameters` and no other parameter."""
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    wanted, short = set(parameters), []
    for path in parameters:
        parts = path.split(".")
        tails = (".".join(parts[-count:]) for count in range(2, len(parts)))
        fitting = (tail for tail in tails if {n for n in every if ends_in(n, tail)} <= wanted)
        name = next(fitting, path)
        if name not in short:
            short.append(name)
    return short


def portable(
    config: PeftConfig, model: nn.Module, modules: Collection[str], parameters: Collection[str]
) -> PeftConfig:
    """Change `config`, to be written, so that PEFT finds the same modules when it loads it, with
    the same ranks.

    Args:
        modules: The paths of adapted modules.
        parameters: Those of adapted parameters.
    """
    renamed = renamed_targets(model)
    mistaken = {path for path in modules if path.rpartition(".")[2] in renamed}
    if mistaken:
        config.target_modules = set(modules) - mistaken
        config.target_parameters = sorted(
            {*(config.target_parameters or ()), *(f"{path}.weight" for path in mistaken)}
        )
    if config.target_parameters:
        config.lora_dropout = 0.0  # PEFT refuses another value, and does not use it to load
    written = {f"{path}.weight" if path in mistaken else path: path for path in modules}
    written |= {path: path for path in parameters}
    for key in PATTERNS:
        setattr(config, key, _in_any_order(getattr(config, key) or {}, written))
    return config


def _in_any_order(patterns: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """`patterns`, or what gives each of `written` (path in the file → path in the model) the value
    that it has in the model: PEFT uses the first match, and sorts what it writes."""
    values = {name: _first_match(patterns, path) for name, path in written.items()}
    in_file = dict(sorted(patterns.items()))
    if all(_first_match(in_file, name) == value for name, value in values.items()):
        return patterns
    return {re.escape(name): value for name, value in values.items() if value is not None}


def _first_match(patterns: dict[str, Any], path: str) -> Any:
    """The value of the first pattern that matches the end of `path`, None without any."""
    return module_value({"patterns": patterns}, "patterns", path, None)


def from_portable(config: PeftConfig, model: nn.Module) -> None:
    """Undo `portable` in a configuration that was read: linear layers get their usual adapters."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    parameters = []
    modules = set(config.target_modules or ())
    for target in config.target_parameters or ():
        module = target.removesuffix(".weight")
        matching = [name for name in linear if module != target and ends_in(name, module)]
        if matching and all(_is_plain(model.get_submodule(name)) for name in matching):
            modules.add(module)
        else:
            parameters.append(target)
    config.target_modules, config.target_parameters = modules, parameters
    for key in PATTERNS:
        values = getattr(config, key) or {}
        of_modules = {re.sub(r"\\?\.weight$", "", p): value for p, value in values.items()}
        setattr(config, key, values | of_modules)


def _is_plain(module: nn.Module) -> bool:
    """Whether `module` only multiplies: a subclass such as a router may do more."""
    return type(module).forward is nn.Linear.forward or hasattr(module, "scales")


def check_experts(
    blocks: list[SparseBlock], parameters: list[str], settings: dict[str, str]
) -> None:
    """Raises UserError if stacks of experts are adapted together with one of `settings` (override →
    why it does not apply)."""
    stacks = [path for block in blocks for path in block.stack_paths() if path in parameters]
    for override, reason in settings.items():
        if stacks:
            raise UserError(
                f"{override} with adapters of experts ({stacks[0]}): {reason}; name the modules "
                "that are to get adapters instead, such as "
                "method.target_modules=[q_proj,k_proj,v_proj,o_proj]"
            )
