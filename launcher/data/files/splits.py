"""The splits of a local folder, by the rules of `datasets`.

They are own code because `datasets` takes seconds to import, and the check before a run must be
short. Four things differ: names are compared without regard to case; a file whose name fits two
splits is not in both of them; where some folders are named after splits, the names of files outside
them count, too; and no pattern reaches a file outside the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from launcher.data.files import readme
from launcher.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
# What `data.eval_path` asks for: the validation split, otherwise test, otherwise the only one.
FOR_EVALUATION = "(for evaluation)"
SAVED_SPLITS = "dataset_dict.json"  # datasets.DatasetDict.save_to_disk
# The rest is from datasets/data_files.py.
KEYWORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "dev", "val"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
DELIMITER = r"[-._ 0-9]"
WORD = re.compile(rf"(?:^|(?<={DELIMITER}))({'|'.join(KEYWORDS)})(?=$|{DELIMITER})")
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")

Splits = dict[str, list[Path]]  # files by split, in the order of their names


def choose(folder: Path, files: list[Path], split: str, subset: str | None) -> list[Path]:
    """Those of the `files` of `folder` that belong to `split`, or all if no name is one of a split.

    Raises UserError if `folder` has no such split or `subset`, and if the file names are ambiguous.
    """
    found = find_splits(folder, files, subset)
    if found is None:
        return _choose_all(folder, files, split)
    name = choose_name(found, split)
    if name is None and split == FOR_EVALUATION:
        raise UserError(
            f"data.eval_path={folder} has neither a validation nor a test split, but "
            f"{', '.join(found)} → a glob of the files to evaluate on"
        )
    if name is None:
        raise UserError(
            f"data.split={split} is not in data.path={folder}; its splits are {', '.join(found)} → "
            f"data.split={next(iter(found))}, or all files with a glob, data.path='{folder}/**'"
        )
    if not found[name]:
        raise UserError(
            f"data.path={folder}: the files of the split {name} are missing; download them"
        )
    return found[name]


def choose_name(names: Iterable[str], split: str) -> str | None:
    """The name that `split` stands for, or None. `valid`, `dev` and `val` are `validation`, and so
    on."""
    names = list(names)
    if split == FOR_EVALUATION:
        preferred = choose_name(names, VALIDATION) or choose_name(names, TEST)
        return preferred or (names[0] if len(names) == 1 else None)
    same = [name for name in names if _canonical(name) == _canonical(split)]
    return split if split in names else next(iter(same), None)


def has_subset(folder: Path, files: list[Path], subset: str) -> bool:
    """Whether README.md lists `subset`, or if it lists nothing, whether `folder` contains it."""
    configs = readme.read_configs(folder)
    return subset in configs if configs else bool(_within(folder / subset, files))


def find_splits(folder: Path, files: list[Path], subset: str | None) -> Splits | None:
    """The files of each split of `folder`, or None if it has no splits. Raises UserError for an
    unknown `subset`."""
    if configs := readme.read_configs(folder):
        entry = configs[readme.choose_config(folder, configs, subset)]
        base = readme.data_folder(folder, entry)
        if patterns := readme.read_patterns(folder, entry):
            listed = {name: readme.match(base, globs) for name, globs in patterns.items()}
            return {
                name: [each for each in files if found & {each, *each.parents}]
                for name, found in listed.items()
            }
    elif subset is not None:
        base = folder / subset
    else:
        return _find_by_names(folder, files)
    if not (within := _within(base, files)):
        present = sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder})
        raise UserError(
            f"data.subset={subset}: there is no {base} with data files → "
            + (f"data.subset, one of {', '.join(present)}" if present else "data.subset=null")
        )
    return _find_by_names(base, within) or {TRAIN: within}


def _choose_all(folder: Path, files: list[Path], split: str) -> list[Path]:
    if split != FOR_EVALUATION and _canonical(split) != TRAIN:
        raise UserError(
            f"data.split={split}: no file or folder in data.path={folder} is named after a split → "
            f"data.split={TRAIN}, which reads all files"
        )
    return files


def _find_by_names(folder: Path, files: list[Path]) -> Splits | None:
    if (folder / SAVED_SPLITS).is_file():
        return {name: _within(folder / name, files) for name in _read_saved(folder / SAVED_SPLITS)}
    paths = {file: file.relative_to(folder) for file in files}
    shards = {file: SHARD.fullmatch(path.as_posix()) for file, path in paths.items()}
    splits = _group({file: {match[1]} for file, match in shards.items() if match})
    if len(splits) > 1 or any(WORD.search(name.lower()) for name in splits):
        return splits
    in_folders = _distinguishing({f: _of_folders(p.parent.parts) for f, p in paths.items()})
    in_names = _distinguishing({file: _of_name(path.name) for file, path in paths.items()})
    found = {file: in_folders.get(file) or in_names.get(file, set()) for file in files}
    return _group(found) or None


def _read_saved(file: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} lists no splits: {error}; save the data set again") from error


def _group(found: dict[Path, set[str]]) -> Splits:
    splits: Splits = {}
    for file, names in found.items():
        if len(names) > 1:
            raise UserError(
                f"data.path: the name of {file} fits the splits {', '.join(sorted(names))} → "
                "rename it, or name the files with a glob"
            )
        for name in names:
            splits.setdefault(name, []).append(file)
    order = [*dict.fromkeys(KEYWORDS.values())]
    return dict(
        sorted(splits.items(), key=lambda each: [split not in _of_name(each[0]) for split in order])
    )


def _of_name(name: str) -> set[str]:
    """The splits whose words are in `name`."""
    return {KEYWORDS[word] for word in WORD.findall(name.lower())}


def _of_folders(names: tuple[str, ...]) -> set[str]:
    """The splits in the names of folders. A folder called `train` says more than `train_v2`."""
    exact = {KEYWORDS[name.lower()] for name in names if name.lower() in KEYWORDS}
    return exact or {split for name in names for split in _of_name(name)}


def _distinguishing(found: dict[Path, set[str]]) -> dict[Path, set[str]]:
    """Without the splits that all files have beside another: `test` of test_set_train.jsonl and
    test_set_dev.jsonl, and both of train_test_split/."""
    common = set.intersection(*found.values())
    if all(names == common for names in found.values()):
        return found if len(common) == 1 else {}
    rest = {file: names - common for file, names in found.items()}
    return rest if all(rest.values()) else found


def _within(folder: Path, files: list[Path]) -> list[Path]:
    return [file for file in files if folder in file.parents]


def _canonical(split: str) -> str:
    return KEYWORDS.get(split.lower(), split)
