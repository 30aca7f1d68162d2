"""The tensors that LoRA stores for one module, and the check that they fit it."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.errors import UserError
from launcher.folders.brief import listed
from launcher.io.adapter import Adapter
from launcher.io.adapter_config import rank_and_scale
from launcher.io.tensor import Tensor

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
        """The names in the adapter's file."""
        tensors = (self.a, self.b, self.bias, self.magnitude)
        return [tensor.name for tensor in tensors if tensor is not None]

    def refuse_dora_and_bias(self, adapter: Adapter, module: str) -> None:
        """Raises UserError for DoRA and lora_bias, which PEFT supports only on whole layers."""
        if self.magnitude is not None or self.bias is not None:
            variant = "DoRA" if self.bias is None else "lora_bias"
            raise UserError(
                f"{adapter.origin}: {module} was trained with {variant}, which PEFT cannot apply "
                "to a fused or single parameter; merge it with the libraries that it was trained "
                "with"
            )

    def checked_rank_and_scale(
        self, adapter: Adapter, module: str, inputs: int, outputs: int, weight: tuple[int, ...],
        experts: int = 1,
    ) -> tuple[int, float]:  # fmt: skip
        """The rank and scale of the module. Raises UserError if a shape does not match `inputs`,
        `outputs` and the rank. `weight`: the base's shape, for the message."""
        rank, scale = rank_and_scale(adapter.config, module)
        if (self.a.shape, self.b.shape) != ((rank * experts, inputs), (outputs, rank * experts)):
            raise UserError(
                f"{adapter.origin}: {module} has A {list(self.a.shape)} and B "
                f"{list(self.b.shape)}, which do not fit rank {rank} and the base's weight "
                f"{list(weight)}; does the adapter belong to another model?"
            )
        if self.magnitude is not None and self.magnitude.shape != (outputs,):
            raise UserError(
                f"{adapter.origin}: {module} has a magnitude {list(self.magnitude.shape)}, which "
                f"does not fit its {outputs} outputs; does the adapter belong to another model?"
            )
        return rank, scale


def collect_factors(adapter: Adapter, module: str, parts: dict[str, Tensor]) -> Factors:
    """The factors of a module from its tensors by part name ("A", "B.bias", …). Raises UserError if
    one is missing, or if there is one that the config does not announce."""
    embedding = any(part.startswith("embedding_") for part in parts)
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    needed = {a, b}
    if adapter.config.get("lora_bias") and not embedding:
        needed.add("B.bias")
    if adapter.config.get("use_dora"):
        needed.add("magnitude_vector")
    if missing := needed - parts.keys():
        raise UserError(
            f"{adapter.origin}: {module} has {_names(parts)} but not {_names(missing)}; the "
            "adapter was saved incompletely, so save it again"
        )
    if extra := parts.keys() - needed:
        raise UserError(
            f"{adapter.origin}: {module} has {_names(extra)}, which adapter_config.json does not "
            "announce; use the config that was saved with these weights"
        )
    return Factors(
        parts[a], parts[b], embedding, parts.get("B.bias"), parts.get("magnitude_vector")
    )


def unmatched_error(adapter: Adapter, keys: list[str]) -> UserError:
    """The error for adapter tensors that match nothing in the base."""
    return UserError(
        f"{adapter.origin}: {len(keys)} of {len(adapter.tensors)} tensors fit nothing in the base "
        f"({listed(sorted(keys), LISTED)}); does the adapter belong to another model?"
    )


def _names(parts: set[str] | dict[str, Tensor]) -> str:
    return ", ".join(f"lora_{part}" for part in sorted(parts))
