"""The dtype that a config.json states is found in each of the forms that libraries write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.io.stated_dtype import stated_dtype


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "float32"}, torch.float32),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, torch.float32),
        ({"dtype": "float8_e4m3fn"}, torch.float8_e4m3fn),
        ({"dtype": "Tensor"}, None),
        ({"dtype": "auto"}, None),
        ({}, None),
    ],
)
def test_the_dtype_of_a_config(config: dict[str, Any], expected: torch.dtype | None) -> None:
    assert stated_dtype(config) == expected
