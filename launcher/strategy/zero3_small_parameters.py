"""The parameters that zero3 keeps complete on every rank: those with at most
`strategy.persistence_threshold` elements, such as norms and most adapters.

A step changes each rank's part of them, and then every rank gathers the others' parts. The engine
sends one message for each parameter, hundreds with adapters, and waits for the device. Here they
are gathered in buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


class SmallParameters:
    """The small parameters of the engine's optimizer `zero`, which from now on gathers none."""

    def __init__(self, zero: Any, bucket_size: int) -> None:
        """`bucket_size`: elements of a message, unless one parameter has more."""
        self._parameters: list[Any] = zero.persistent_parameters
        self._bucket_size = bucket_size
        zero.persistent_parameters = []

    def gather(self) -> None:
        """Gather those of which a step has changed this rank's part. Collective."""
        changed = [p for p in self._parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        for bucket in _buckets(changed, self._bucket_size):
            bucket[0].all_gather_coalesced(bucket).wait()

    def gather_again(self) -> None:
        """Gather all of them from the parts of the ranks, which somebody else has changed.
        Collective."""
        if self._parameters:
            self._parameters[0].partition(self._parameters)
        self.gather()


def _buckets(parameters: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Neighbors with at most `size` elements together."""
    bucket: list[Any] = []
    elements = 0
    for parameter in parameters:
        if bucket and elements + parameter.ds_numel > size:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.ds_numel
    if bucket:
        yield bucket
