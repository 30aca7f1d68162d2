"""Finds the model in what a trainer saved: which of the nested dicts is its state.

A model that is averaged (ema), a reference, a critic or a teacher lies beside the one that was
trained. Entries are described by paths: the keys of the nested dicts that lead to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import UserError
from launcher.folders.brief import listed
from launcher.io.readers.found import FoundModel
from launcher.io.readers.wrapper_prefixes import strip_wrappers
from launcher.io.tensor import Tensor

Entry = TypeVar("Entry", bound=Hashable)
Keys = tuple[str, ...]  # of nested dicts, the outermost first; (): the saved dict itself

# What trainers save the model that they train under.
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "policy", "actor", "student")
# What they save other models under, beside it.
OTHER_KEYS = (
    *("ema", "ema_model", "model_ema", "critic", "teacher", "target", "value", "value_model"),
    *("ref", "reference", "ref_model", "reference_model", "ref_policy", "reward", "reward_model"),
)
OPTIMIZER = ("optim", "lr_scheduler", "scheduler")  # how the names of other entries begin
TOP = "."  # --model-key of the saved dict itself
MAX_DEPTH = 8  # of the dicts in a torch file that are looked at
SMALL = 10  # a state with less than a tenth of the tensors of another is no model
LISTED = 5  # names in a message


def find_model(
    paths: Mapping[Entry, Keys], tensors: Collection[Entry], origin: Path, key: str | None
) -> tuple[dict[Entry, str], tuple[str, ...]]:
    """(entry → its name in the model, for those of the model; a note on other models).

    Args:
        paths: Of all entries.
        tensors: Which of them are tensors.
        origin: The file, for messages.
        key: The model to take (--model-key): one of the keys that lead to it, or all of them with
            dots between them.

    Raises UserError if two models are as likely the trained one, or if there is none of that key.
    """
    paths = _by_role(paths, tensors)
    states = _states({each: paths[each] for each in tensors})
    chosen = _choose(states, origin, key)
    return _names(paths, states, chosen), _describe_others(states, chosen)


def model_dict(
    content: dict[Any, Any], file: Path, key: str | None
) -> tuple[dict[str, Tensor], list[str], tuple[str, ...], bool]:
    """The model in the content of a torch file: (name → tensor, names of what else lies beside
    them, notes, whether it is nested).

    Whether the names of a state that is not nested begin with those of several models is for all
    files of the folder to say: `model_tensors`. Raises UserError as `find_model` does.
    """
    entries = _entries(content)
    tensors = {path for path, value in entries.items() if isinstance(value, Tensor)}
    states = _states({path: path for path in tensors})
    chosen = () if states.keys() <= {()} else _choose(states, file, key)
    names = _names({path: path for path in entries}, states, chosen)
    found = {name: entries[path].renamed(name) for path, name in names.items() if path in tensors}
    depth = len(chosen)
    beside = {path[depth] for path in entries if _is_under(path, chosen)}
    with_tensors = {path[depth] for path in tensors if _is_under(path, chosen)}
    return found, sorted(beside - with_tensors), _describe_others(states, chosen), bool(chosen)


def model_tensors(
    tensors: Mapping[str, Tensor], origin: Path, key: str | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors of the model among those of a file without nesting, notes). Raises UserError as
    `find_model` does."""
    names, notes = find_model({name: (name,) for name in tensors}, tensors, origin, key)
    return {new: tensors[old].renamed(new) for old, new in names.items()}, notes


def one_model(found: FoundModel, origin: Path, key: str | None) -> FoundModel:
    """The model in what a reader found, if its names begin with those of several models. Raises
    UserError as `find_model` does."""
    paths = {name: (name,) for name in (*found.tensors, *found.aliases)}
    names, notes = find_model(paths, found.tensors.keys(), origin, key)
    of_model = {old: new for old, new in names.items() if old in found.tensors}
    return replace(
        found,
        tensors={new: found.tensors[old].renamed(new) for old, new in of_model.items()},
        aliases={names[a]: names[n] for a, n in found.aliases.items() if a in names},
        trained=found.trained and frozenset(names[n] for n in found.trained if n in names),
        notes=(*found.notes, *notes),
    )


def _entries(content: dict[Any, Any]) -> dict[Keys, Any]:
    """The values in nested dicts. A dict that occurs twice is looked at once."""
    found: dict[Keys, Any] = {}
    seen = {id(content)}
    level: list[tuple[Keys, dict[Any, Any]]] = [((), content)]
    for _ in range(MAX_DEPTH):
        below: list[tuple[Keys, dict[Any, Any]]] = []
        for keys, each in level:
            for key, value in each.items():
                path = (*keys, str(key))
                if not isinstance(value, dict) or not value:
                    found[path] = value
                elif id(value) not in seen:
                    seen.add(id(value))
                    below.append((path, value))
        level = below
    return found


def _by_role(paths: Mapping[Entry, Keys], tensors: Collection[Entry]) -> Mapping[Entry, Keys]:
    """`paths`; if all tensors lie side by side, and their names begin with what trainers call
    several models (`actor.…`, `critic.…`), these are the first key."""
    short = {each: strip_wrappers(path[0]) for each, path in paths.items() if len(path) == 1}
    weights = {each: name for each, name in short.items() if name and "." in name}
    used = {each for each in tensors if not _is_of_optimizer(paths[each])}
    roles = {name.partition(".")[0] for each, name in weights.items() if each in used}
    if len(roles) < 2 or not roles <= {*MODEL_KEYS, *OTHER_KEYS}:
        return paths
    split = {each: (*name.partition(".")[::2],) for each, name in weights.items()}
    return {each: split.get(each, path) for each, path in paths.items()}


def _states(paths: Mapping[Entry, Keys]) -> dict[Keys, list[Entry]]:
    """Keys → tensors of each dict that may be the state of a model: it has tensors by names of
    parameters, with dots. Without such names: what lies under one of MODEL_KEYS, or everything."""
    dotted: dict[Keys, list[Entry]] = defaultdict(list)
    usable = {each: path for each, path in paths.items() if not _is_of_optimizer(path)}
    for each, path in usable.items():
        if "." in path[-1] and strip_wrappers(path[-1]) is not None:
            dotted[path[:-1]].append(each)
    if dotted:
        return dict(dotted)
    plain: dict[Keys, list[Entry]] = defaultdict(list)
    for each, path in usable.items():
        at = next((at for at in (0, 1) if len(path) > at + 1 and path[at] in MODEL_KEYS), None)
        plain[() if at is None else path[: at + 1]].append(each)
    shells = {keys: [paths[each] for each in own] for keys, own in plain.items()}
    return {_without_shells(keys, shells[keys]): own for keys, own in plain.items()}


def _without_shells(keys: Keys, paths: list[Keys]) -> Keys:
    """`keys`, and those of MODEL_KEYS below it that all `paths` have."""
    at = len(keys)
    after = {path[at] if len(path) > at + 1 else "" for path in paths}
    if keys and len(after) == 1 and after <= {*MODEL_KEYS}:
        return _without_shells((*keys, *after), paths)
    return keys


def _names(
    paths: Mapping[Entry, Keys], states: Mapping[Keys, list[Entry]], chosen: Keys
) -> dict[Entry, str]:
    """Entry → name, for what lies under the keys `chosen` and under none of other `states`."""
    inner = [keys for keys in states if len(keys) > len(chosen) and _is_under(keys, chosen)]
    is_flat = not chosen and any(len(paths[each]) == 1 for each in states.get((), ()))
    return {
        each: ".".join(path[len(chosen) :])
        for each, path in paths.items()
        if _is_under(path, chosen)
        and not any(_is_under(path, keys) for keys in inner)
        and not (is_flat and len(path) > 1)
        and not _is_of_optimizer(path[len(chosen) :])
    }


def _choose(states: Mapping[Keys, list[Any]], origin: Path, key: str | None) -> Keys:
    labels = {keys: ".".join(keys) or TOP for keys in states}
    if key is not None:
        exact = [keys for keys, label in labels.items() if label == key]
        if len(found := exact or [keys for keys in states if key in keys]) == 1:
            return found[0]
        several = "several models" if found else "no model"
        known = listed(sorted(labels.values()), LISTED) or "none"
        raise UserError(f"--model-key {key}: {origin} contains {several} under it → one of {known}")
    largest = max(map(len, states.values()), default=0)
    ranks = {k: _rank(k) for k, own in states.items() if SMALL * len(own) >= largest}
    best = [keys for keys, rank in ranks.items() if rank == min(ranks.values())]
    most = max((len(states[keys]) for keys in best), default=0)
    likely = [keys for keys in best if 2 * len(states[keys]) >= most]
    if len(likely) > 1:
        names = sorted(labels[keys] for keys in likely)
        raise UserError(
            f"{origin} contains {len(names)} models ({listed(names, LISTED)}), and nothing tells "
            f"which of them was trained → --model-key {names[0]}, or another of them"
        )
    return likely[0] if likely else ()


def _rank(keys: Keys) -> int:
    """How likely the dict is the trained model, 0 the most."""
    if all(key in MODEL_KEYS for key in keys):
        return 0
    return 1 if keys[-1] in MODEL_KEYS else 2


def _describe_others(states: Mapping[Keys, list[Any]], chosen: Keys) -> tuple[str, ...]:
    """A note on the other models. What is too small for one is not mentioned."""
    size = len(states.get(chosen, ()))
    models = [k for k, own in states.items() if SMALL * len(own) >= size or _rank(k) < 2]
    others = sorted(".".join(keys) or TOP for keys in models if keys != chosen)
    if not others:
        return ()
    taken = ".".join(chosen) or "at the top"
    return (
        f"SOURCE contains several models: the one {'under ' if chosen else ''}{taken} is taken, "
        f"not {listed(others, LISTED)} (--model-key {others[0]})",
    )


def _is_under(path: Keys, keys: Keys) -> bool:
    return len(path) > len(keys) and path[: len(keys)] == keys


def _is_of_optimizer(path: Keys) -> bool:
    return any(key.startswith(OPTIMIZER) for key in (path[0], *path[1:-1]))
