"""Finds the model in what a trainer saved: which of the nested dicts is its state.

A model that is averaged (ema), a reference, a critic or a teacher lies beside the one that was
trained. Entries are described by paths: the keys of the nested dicts that lead to them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
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
LORA = ".lora_"  # in the names of an adapter's tensors
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
    paths = _by_role(paths, tensors, key)
    states = _states([paths[each] for each in tensors])
    chosen = _choose(states, origin, key)
    return _names(paths, states, chosen), _describe_others(states, chosen)


def model_dict(
    content: dict[Any, Any], file: Path, key: str | None
) -> tuple[dict[str, Tensor], list[str], tuple[str, ...], str | None]:
    """The model in the content of a torch file: (name → tensor, names of what else lies beside
    them, notes, what of `key` is left to choose by names).

    Whether the names in a single state begin with those of several models is for all files of the
    folder to say: `model_tensors`. Raises UserError as `find_model` does.
    """
    entries = _entries(content)
    tensors = {path for path, value in entries.items() if isinstance(value, Tensor)}
    states = _states([*tensors])
    if len(states) > 1:
        chosen, rest = _choose(states, file, key), None
    else:
        chosen, rest = next(iter(states), ()), key
        if key is not None and chosen and (key in chosen or key == ".".join(chosen)):
            rest = None
    names = _names({path: path for path in entries}, states, chosen)
    found = {name: entries[path].renamed(name) for path, name in names.items() if path in tensors}
    depth = len(chosen)
    beside = {path[depth] for path in entries if _is_under(path, chosen)}
    with_tensors = {path[depth] for path in tensors if _is_under(path, chosen)}
    return found, sorted(beside - with_tensors), _describe_others(states, chosen), rest


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


def _by_role(
    paths: Mapping[Entry, Keys], tensors: Collection[Entry], key: str | None
) -> Mapping[Entry, Keys]:
    """`paths`, in which the first part of a name is a key if the names in its dict begin with what
    trainers call several models (`actor.…`, `critic.…`), or with `key`."""
    groups: dict[Keys, dict[Entry, str]] = defaultdict(dict)
    for each in tensors:
        name = strip_wrappers(paths[each][-1])
        if name and "." in name and not _is_of_optimizer(paths[each]):
            groups[paths[each][:-1]][each] = name
    if key is not None and any(key in path[:-1] for path in paths.values()):
        key = None  # of a dict
    by_name = {keys: _roles([*names.values()], key) for keys, names in groups.items()}
    result = dict(paths)
    for each, path in paths.items():
        first, _, rest = (strip_wrappers(path[-1]) or "").partition(".")
        if rest and first in by_name.get(path[:-1], ()):
            result[each] = (*path[:-1], first, rest)
    return result


def _roles(names: Sequence[str], key: str | None) -> set[str]:
    """With which of OTHER_KEYS and MODEL_KEYS `names` begin, if they begin with several of them and
    hardly with anything else, and have the same names after them: `model.` begins the names of most
    models. `key` is one of them if some names begin with it."""
    rests: dict[str, set[str]] = defaultdict(set)
    for name in names:
        first, _, rest = name.partition(".")
        rests[first].add(rest)
    named = {each: own for each, own in rests.items() if each in (*MODEL_KEYS, *OTHER_KEYS)}
    roles = {
        one
        for one, other in permutations(named, 2)
        if 2 * len(named[one] & named[other]) >= min(len(named[one]), len(named[other]))
    }
    most = max((len(rests[each]) for each in roles), default=0)
    if roles and SMALL * sum(len(rests[each]) for each in rests.keys() - roles) < most:
        return roles
    return {key} if key is not None and 0 < len(rests.get(key, ())) < len(names) else set()


def _states(tensors: Iterable[Keys]) -> dict[Keys, list[Keys]]:
    """Keys → the paths of the tensors in each dict that may be the state of a model: it has tensors
    by names of parameters, with dots. Without such names: what lies under one of MODEL_KEYS, or
    everything."""
    dotted: dict[Keys, list[Keys]] = defaultdict(list)
    usable = [path for path in tensors if not _is_of_optimizer(path)]
    for path in usable:
        if "." in path[-1] and strip_wrappers(path[-1]) is not None:
            dotted[path[:-1]].append(path)
    if dotted:
        return dict(dotted)
    plain: dict[Keys, list[Keys]] = defaultdict(list)
    for path in usable:
        at = next((at for at in (0, 1) if len(path) > at + 1 and path[at] in MODEL_KEYS), None)
        plain[() if at is None else path[: at + 1]].append(path)
    return {_without_shells(keys, own): own for keys, own in plain.items()}


def _without_shells(keys: Keys, paths: list[Keys]) -> Keys:
    """`keys`, and those of MODEL_KEYS below it that all `paths` have."""
    at = len(keys)
    after = {path[at] if len(path) > at + 1 else "" for path in paths}
    if keys and len(after) == 1 and after <= {*MODEL_KEYS}:
        return _without_shells((*keys, *after), paths)
    return keys


def _names(
    paths: Mapping[Entry, Keys], states: Mapping[Keys, list[Keys]], chosen: Keys
) -> dict[Entry, str]:
    """Entry → name, for what lies under the keys `chosen` and under none of other `states`."""
    inner = [keys for keys in states if len(keys) > len(chosen) and _is_under(keys, chosen)]
    is_flat = not chosen and any(len(path) == 1 for path in states.get((), ()))
    return {
        each: ".".join(path[len(chosen) :])
        for each, path in paths.items()
        if _is_under(path, chosen)
        and not any(_is_under(path, keys) for keys in inner)
        and not (is_flat and len(path) > 1)
        and not _is_of_optimizer(path[len(chosen) :])
    }


def _choose(states: Mapping[Keys, list[Keys]], origin: Path, key: str | None) -> Keys:
    labels = {keys: ".".join(keys) or TOP for keys in states}
    if key is not None:
        exact = [keys for keys, label in labels.items() if label == key]
        if len(found := exact or [keys for keys in states if key in keys]) == 1:
            return found[0]
        if states.keys() <= {()}:
            raise UserError(
                f"--model-key {key}: {origin} contains one model, under no key → leave it out"
            )
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
    chosen = likely[0] if likely else ()
    adapters = [keys for keys, own in states.items() if any(LORA in path[-1] for path in own)]
    if adapters and chosen not in adapters:
        raise UserError(
            f"{origin} contains an adapter under {labels[adapters[0]]}, and the model under "
            f"{labels[chosen]} is without it → the state of the whole PEFT model, or --model-key "
            f"{labels[chosen]} for the model alone"
        )
    return chosen


def _rank(keys: Keys) -> int:
    """How likely the dict is the trained model, 0 the most."""
    if all(key in MODEL_KEYS for key in keys):
        return 0
    return 1 if keys[-1] in MODEL_KEYS else 2


def _describe_others(states: Mapping[Keys, list[Keys]], chosen: Keys) -> tuple[str, ...]:
    """A note on the other models. What is too small for one is not mentioned."""
    size = len(states.get(chosen, ()))
    models = [keys for keys, own in states.items() if SMALL * len(own) >= size or _rank(keys) < 2]
    around = [chosen[:depth] for depth in range(len(chosen))]
    small = [keys for keys in around if SMALL * len(states.get(keys, ())) < size]
    others = sorted(".".join(keys) or TOP for keys in models if keys not in (chosen, *small))
    if not others:
        return ()
    taken = ".".join(chosen) or "at the top"
    named = listed(["at the top" if each == TOP else each for each in others], LISTED)
    return (
        f"SOURCE contains several models: the one {'under ' if chosen else ''}{taken} is taken, "
        f"not {named} (--model-key {others[0]})",
    )


def _is_under(path: Keys, keys: Keys) -> bool:
    return len(path) > len(keys) and path[: len(keys)] == keys


def _is_of_optimizer(path: Keys) -> bool:
    return any(key.startswith(OPTIMIZER) for key in (path[0], *path[1:-1]))
