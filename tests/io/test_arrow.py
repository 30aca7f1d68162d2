"""Arrow arrays as NumPy arrays, without pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from launcher.io import arrow

WITH_NULLS = pa.array([1.5, None, -2.0, None, 0.0, *range(20)], pa.float64())


@pytest.mark.parametrize("part", [slice(0, None), slice(1, None), slice(3, 9), slice(4, 4)])
def test_nulls_are_nan_in_any_part_of_an_array(part: slice) -> None:
    expected = WITH_NULLS[part].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(arrow.floats(WITH_NULLS[part]), expected)


def test_values_are_not_copied() -> None:
    array = pa.array([3, 1, 2], pa.int32())[1:]
    assert arrow.values(array, np.int32).tolist() == [1, 2]
    assert arrow.values(array, np.int32).ctypes.data == array.buffers()[1].address + 4


def test_the_curves_of_a_run_are_read_without_pandas() -> None:
    script = (
        "import sys; from launcher.run.curves import _fast_columns\n"
        'columns = _fast_columns(b\'{"step": 1, "loss": 2.5}\\n{"step": 2}\\n\')\n'
        "assert columns['loss'][0] == 2.5 and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
