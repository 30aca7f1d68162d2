"""bitsandbytes' 4-bit and 8-bit weights as floating-point tensors, a tile of rows at a time.

4-bit (QLoRA, https://arxiv.org/abs/2305.14314): the flattened weight is divided into blocks of 64.
A block stores its largest magnitude and, for each element, the index of one of 16 values in
[-1, 1]. With double quantization the mean is subtracted from the magnitudes, and they are stored as
8-bit indices in blocks of 256.

8-bit (LLM.int8(), https://arxiv.org/abs/2208.07339): each row stores its largest magnitude and
int8 values.

All arithmetic is that of bitsandbytes 0.50 on a CPU: in float32, with one rounding to the tensor's
dtype. Values are bit-equal, except for the sign of a zero in fp4, in which bitsandbytes' own
kernels differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from launcher.io.tensor import Tensor
from launcher.io.tensor.tiles import refuse_overflow, spans

STEP_8BIT = 7.874015718698502e-3  # 1/127, as it is in bitsandbytes

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockRange:
    """The blocks of the flattened matrix that contain some of its rows, and the rows that contain
    those blocks."""

    begin: int  # in elements, of the first block
    end: int  # in elements, of the last block
    rows: tuple[int, int]  # [first, last)
    offset: int  # elements of the blocks before the requested rows
    count: int  # elements of the requested rows

    @classmethod
    def covering(cls, tensor: Tensor, first: int, last: int, block: int) -> BlockRange:
        """The blocks of size `block` that contain rows [first, last) of `tensor`."""
        width = tensor.columns
        begin = first * width // block * block
        end = min(-(-last * width // block) * block, tensor.rows * width)
        rows = begin // width, -(-end // width)
        return cls(begin, end, rows, first * width - begin, (last - first) * width)

    def requested_rows(self, flat: torch.Tensor, columns: int) -> torch.Tensor:
        """The requested rows, from the elements [begin, end)."""
        return flat[self.offset : self.offset + self.count].view(-1, columns)


@dataclass(frozen=True, eq=False)
class FourBitWeight(Tensor):
    """A 4-bit weight on disk.

    `packed`: two indices in each byte, the first in the high half, in any dtype. `absmax`: float32,
    or uint8 if there are `nested` scales.
    """

    packed: Tensor
    absmax: Tensor
    values: torch.Tensor  # [16] float32
    block: int
    nested: NestedScales | None

    def read_into(self, out: torch.Tensor, first: int) -> None:
        pairs = torch.cartesian_prod(self.values, self.values)  # [256, 2]: the values of each byte
        pair_bits = pairs.view(torch.int64).view(-1)  # selects both values as one number
        for top, bottom in spans(len(out), self.columns):
            block_range = BlockRange.covering(self, first + top, first + bottom, self.block)
            blocks = block_range.begin // self.block, -(-block_range.end // self.block)
            scales = self.absmax.read(*blocks).view(-1)
            if self.nested:
                scales = self.nested.scales(scales, blocks[0])
            selected = pair_bits.index_select(0, self._bytes(block_range).int())
            flat = selected.view(torch.float32)[: block_range.end - block_range.begin]
            scale_blocks(flat, scales, self.block)
            out[top:bottom].copy_(block_range.requested_rows(flat, self.columns))
            refuse_overflow(self.name, flat, out[top:bottom])

    def reference(self, first: int, last: int) -> torch.Tensor:
        block_range = BlockRange.covering(self, first, last, self.block)
        count = block_range.end - block_range.begin
        packed = self._bytes(block_range).numpy()
        indices = np.stack([packed // 16, packed % 16], axis=1).reshape(-1)[:count]
        blocks = np.arange(block_range.begin // self.block, -(-block_range.end // self.block))
        scales = self.absmax.read(int(blocks[0]), int(blocks[-1]) + 1).view(-1).numpy()
        if self.nested:
            scales = self.nested.reference_scales(scales, blocks)
        values = np.take(self.values.numpy(), indices)
        values = values * scales[np.arange(len(values)) // self.block]
        return block_range.requested_rows(torch.from_numpy(values).double(), self.columns)

    def files(self) -> Iterator[Path]:
        nested_files = self.nested.absmax.files() if self.nested else ()
        return itertools.chain(self.packed.files(), self.absmax.files(), nested_files)

    def _bytes(self, block_range: BlockRange) -> torch.Tensor:
        """The packed bytes (uint8) of the blocks."""
        width = self.packed.dtype.itemsize
        first, last = block_range.begin // 2, -(-block_range.end // 2)
        top = first // width
        stored = self.packed.read(top, -(-last // width)).view(torch.uint8).view(-1)
        return stored[first - top * width : last - top * width]


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Magnitudes of blocks as 8-bit indices: value × magnitude of the outer block + mean."""

    absmax: Tensor
    values: torch.Tensor  # [256] float32
    block: int
    mean: float

    def scales(self, indices: torch.Tensor, first: int) -> torch.Tensor:
        """Magnitudes [first, first + len(indices)) as float32."""
        top, bottom = first // self.block, -(-(first + len(indices)) // self.block)
        outer = self.absmax.read(top, bottom).view(-1).repeat_interleave(self.block)
        outer = outer[first - top * self.block :][: len(indices)]
        return self.values[indices.int()] * outer + torch.tensor(self.mean)

    def reference_scales(
        self, indices: npt.NDArray[np.uint8], blocks: npt.NDArray[np.int64]
    ) -> Array:
        """The magnitudes of `blocks`, computed with numpy."""
        outer = blocks // self.block
        magnitudes = self.absmax.reference(int(outer[0]), int(outer[-1]) + 1).view(-1).numpy()
        product = np.take(self.values.numpy(), indices) * magnitudes[outer - outer[0]].astype("f4")
        scales: Array = product + np.float32(self.mean)
        return scales


@dataclass(frozen=True, eq=False)
class EightBitWeight(Tensor):
    """An 8-bit weight on disk: int8 `source` [rows, columns], float32 `absmax` [rows]."""

    source: Tensor
    absmax: Tensor

    def read_into(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            last = first + bottom
            scales = self.absmax.read(first + top, last).view(-1, 1)
            values = self.source.read(first + top, last) * scales * STEP_8BIT
            out[top:bottom].copy_(values)
            refuse_overflow(self.name, values, out[top:bottom])

    def reference(self, first: int, last: int) -> torch.Tensor:
        scales = self.absmax.reference(first, last).numpy().astype("f4").reshape(-1, 1)
        integers = self.source.reference(first, last).numpy().astype("f4")
        values = integers * scales * np.float32(STEP_8BIT)
        return torch.from_numpy(values.astype("f8"))

    def files(self) -> Iterator[Path]:
        return itertools.chain(self.source.files(), self.absmax.files())


def scale_blocks(flat: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Multiply each block of `flat` by its magnitude, in place. The last block may be shorter."""
    full = len(flat) // block * block
    flat[:full].view(-1, block).mul_(scales[: full // block, None])
    flat[full:].mul_(scales[-1])
