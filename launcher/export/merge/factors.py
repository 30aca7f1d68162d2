"""The tensors that LoRA keeps for one module, and whether they fit it."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UserError
from launcher.export.merge.adapter import Adapter
from launcher.export.merge.settings import rank_and_scale
from launcher.export.tensor import Tensor

LISTED = 5  # names in a message


@dataclass(frozen=True, eq=False)
class Factors:
    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    embedding: bool
    bias: Tensor | None  # [out], of lora_B
    magnitude: Tensor | None  # [out], DoRA

    @property
    def keys(self) -> list[str]:
        """The names in the file."""
        every = (self.a, self.b, self.bias, self.magnitude)
        return [tensor.name for tensor in every if tensor is not None]

    def refuse_more(self, adapter: Adapter, module: str) -> None:
        """UserError for DoRA and lora_bias, which PEFT knows on whole layers only."""
        if self.magnitude is not None or self.bias is not None:
            what = "DoRA" if self.bias is None else "lora_bias"
            raise UserError(
                f"{adapter.origin}: {module} was trained with {what}, which PEFT cannot apply to a "
                "fused or single parameter; merge it with the libraries that it was trained with"
            )

    def checked(
        self, adapter: Adapter, module: str, inputs: int, outputs: int, weight: tuple[int, ...],
        experts: int = 1,
    ) -> tuple[int, float]:  # fmt: skip
        """The rank and scale of the module; UserError when a shape disagrees."""
        rank, scale = rank_and_scale(adapter.config, module)
        if (self.a.shape, self.b.shape) != ((rank * experts, inputs), (outputs, rank * experts)):
            raise UserError(
                f"{adapter.origin}: {module} has A {list(self.a.shape)} and B "
                f"{list(self.b.shape)}, which do not fit rank {rank} and the base's weight "
                f"{list(weight)}; is the adapter another model's?"
            )
        if self.magnitude is not None and self.magnitude.shape != (outputs,):
            raise UserError(
                f"{adapter.origin}: {module} has a magnitude {list(self.magnitude.shape)}, which "
                f"does not fit its {outputs} outputs; is the adapter another model's?"
            )
        return rank, scale


def factors(adapter: Adapter, module: str, parts: dict[str, Tensor]) -> Factors:
    """Of the tensors found for a module; UserError when one is missing or too many."""
    embedding = any(part.startswith("embedding_") for part in parts)
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    needed = {a, b}
    if adapter.config.get("lora_bias") and not embedding:
        needed.add("B.bias")
    if adapter.config.get("use_dora"):
        needed.add("magnitude_vector")
    if lost := needed - parts.keys():
        raise UserError(
            f"{adapter.origin}: {module} has {_names(parts)} but not {_names(lost)}; the adapter "
            "was saved in part, so save it again"
        )
    if extra := parts.keys() - needed:
        raise UserError(
            f"{adapter.origin}: {module} has {_names(extra)}, which adapter_config.json does not "
            "announce; take the config that was saved with these weights"
        )
    return Factors(
        parts[a], parts[b], embedding, parts.get("B.bias"), parts.get("magnitude_vector")
    )


def unmatched(adapter: Adapter, keys: list[str]) -> UserError:
    """For tensors of the adapter that the base has no place for."""
    listed = ", ".join(sorted(keys)[:LISTED]) + (", …" if len(keys) > LISTED else "")
    return UserError(
        f"{adapter.origin}: {len(keys)} of {len(adapter.tensors)} tensors fit nothing in the base "
        f"({listed}); is the adapter another model's?"
    )


def _names(parts: set[str] | dict[str, Tensor]) -> str:
    return ", ".join(f"lora_{part}" for part in sorted(parts))
