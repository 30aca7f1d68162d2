"""bitsandbytes' 4-bit and 8-bit weights as floating-point tensors, a tile of rows at a time.

4-bit (QLoRA, https://arxiv.org/abs/2305.14314): the flattened weight in blocks of 64; a block keeps
its largest magnitude and for each element the index of one of 16 values in [-1, 1]. With double
quantisation the magnitudes, less their mean, are kept as 8-bit indices in blocks of 256. 8-bit
(LLM.int8(), https://arxiv.org/abs/2208.07339): each row keeps its largest magnitude and int8s.
All arithmetic is bitsandbytes 0.50's on a CPU, in float32, and rounds once to the tensor's dtype.
Values are equal bit for bit, but for the sign of a zero of fp4, which its own kernels disagree on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from launcher.export.tensor import Tensor
from launcher.export.tensor.tiles import refuse_overflow, spans

STEP_8 = 7.874015718698502e-3  # 1/127, as bitsandbytes has it

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """Whole blocks of the flattened matrix that hold some of its rows, and the rows that hold
    those blocks."""

    begin: int  # elements, of the first block
    end: int
    rows: tuple[int, int]
    lead: int  # elements of the blocks before the rows asked for
    count: int  # elements asked for

    @classmethod
    def around(cls, tensor: Tensor, first: int, last: int, block: int) -> Run:
        width = tensor.columns
        begin = first * width // block * block
        end = min(-(-last * width // block) * block, tensor.rows * width)
        rows = begin // width, -(-end // width)
        return cls(begin, end, rows, first * width - begin, (last - first) * width)

    def asked(self, flat: torch.Tensor, columns: int) -> torch.Tensor:
        return flat[self.lead : self.lead + self.count].view(-1, columns)


@dataclass(frozen=True, eq=False)
class FourBit(Tensor):
    """A 4-bit weight on disk. `packed`: two indices a byte, the first in the high half, in any
    dtype; `absmax`: float32, or uint8 when `nested`."""

    packed: Tensor
    absmax: Tensor
    values: torch.Tensor  # [16] float32
    block: int
    nested: Nested | None

    def fill(self, out: torch.Tensor, first: int) -> None:
        pairs = torch.cartesian_prod(self.values, self.values)  # [256, 2], those of each byte
        pair = pairs.view(torch.int64).view(-1)  # selected as one number each
        for top, bottom in spans(len(out), self.columns):
            run = Run.around(self, first + top, first + bottom, self.block)
            blocks = run.begin // self.block, -(-run.end // self.block)
            scales = self.absmax.read(*blocks).view(-1)
            if self.nested:
                scales = self.nested.scales(scales, blocks[0])
            found = pair.index_select(0, self._bytes(run).int())
            flat = found.view(torch.float32)[: run.end - run.begin]
            scale(flat, scales, self.block)
            out[top:bottom].copy_(run.asked(flat, self.columns))
            refuse_overflow(self.name, flat, out[top:bottom])

    def exact(self, first: int, last: int) -> torch.Tensor:
        run = Run.around(self, first, last, self.block)
        packed = self._bytes(run).numpy()
        indices = np.stack([packed // 16, packed % 16], axis=1).reshape(-1)[: run.end - run.begin]
        blocks = np.arange(run.begin // self.block, -(-run.end // self.block))
        scales = self.absmax.read(int(blocks[0]), int(blocks[-1]) + 1).view(-1).numpy()
        if self.nested:
            scales = self.nested.scales_exact(scales, blocks)
        values = np.take(self.values.numpy(), indices)
        values = values * scales[np.arange(len(values)) // self.block]
        return run.asked(torch.from_numpy(values).double(), self.columns)

    def files(self) -> Iterator[Path]:
        also = self.nested.absmax.files() if self.nested else ()
        return itertools.chain(self.packed.files(), self.absmax.files(), also)

    def _bytes(self, run: Run) -> torch.Tensor:
        width = self.packed.dtype.itemsize
        first, last = run.begin // 2, -(-run.end // 2)
        top = first // width
        stored = self.packed.read(top, -(-last // width)).view(torch.uint8).view(-1)
        return stored[first - top * width : last - top * width]


@dataclass(frozen=True, eq=False)
class Nested:
    """Magnitudes of blocks as 8-bit indices: value × magnitude of its block + mean."""

    absmax: Tensor
    values: torch.Tensor  # [256] float32
    block: int
    mean: float

    def scales(self, indices: torch.Tensor, first: int) -> torch.Tensor:
        """Magnitudes [first, first + len(indices))."""
        top, bottom = first // self.block, -(-(first + len(indices)) // self.block)
        above = self.absmax.read(top, bottom).view(-1).repeat_interleave(self.block)
        above = above[first - top * self.block :][: len(indices)]
        return self.values[indices.int()] * above + torch.tensor(self.mean)

    def scales_exact(self, indices: npt.NDArray[np.uint8], blocks: npt.NDArray[np.int64]) -> Array:
        above = blocks // self.block
        magnitudes = self.absmax.exact(int(above[0]), int(above[-1]) + 1).view(-1).numpy()
        product = np.take(self.values.numpy(), indices) * magnitudes[above - above[0]].astype("f4")
        scales: Array = product + np.float32(self.mean)
        return scales


@dataclass(frozen=True, eq=False)
class EightBit(Tensor):
    """An 8-bit weight on disk: int8 `of` [rows, columns], float32 `absmax` [rows]."""

    of: Tensor
    absmax: Tensor

    def fill(self, out: torch.Tensor, first: int) -> None:
        for top, bottom in spans(len(out), self.columns):
            last = first + bottom
            scales = self.absmax.read(first + top, last).view(-1, 1)
            values = self.of.read(first + top, last) * scales * STEP_8
            out[top:bottom].copy_(values)
            refuse_overflow(self.name, values, out[top:bottom])

    def exact(self, first: int, last: int) -> torch.Tensor:
        scales = self.absmax.exact(first, last).numpy().astype("f4").reshape(-1, 1)
        values = self.of.exact(first, last).numpy().astype("f4") * scales * np.float32(STEP_8)
        return torch.from_numpy(values.astype("f8"))

    def files(self) -> Iterator[Path]:
        return itertools.chain(self.of.files(), self.absmax.files())


def scale(flat: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Multiply each block by its magnitude; the last may be shorter."""
    full = len(flat) // block * block
    flat[:full].view(-1, block).mul_(scales[: full // block, None])
    flat[full:].mul_(scales[-1])
