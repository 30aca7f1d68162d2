"""The header of a safetensors file is read in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.folders.tensor_entries import MAX_OBJECTS, read_header


def test_a_header_with_countless_empty_tensors_is_refused_before_it_is_parsed(
    tmp_path: Path,
) -> None:
    entry = b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for count in (1000, MAX_OBJECTS):
        text = b"{" + b",".join(entry % number for number in range(count)) + b"}"
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text)
        if count < MAX_OBJECTS:
            assert len(read_header(tmp_path / "file").entries) == count
    with pytest.raises(
        UserError, match=r"file is not a safetensors file: .* lists 200,001 tensors"
    ):
        read_header(tmp_path / "file")
