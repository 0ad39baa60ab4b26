"""What the models of all families have in common: embedders, then blocks, then a head.

That is all that checkpointing, compilation, sharding and pipelines go by.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from flux_trainer.models.init import Constant, Distribution, Normal, Rows, xavier_uniform
from flux_trainer.models.layers import FusedLinear

State = tuple[Tensor, ...]
"""What goes from block to block; each tensor has the samples along its first dimension."""


class FluxModel(nn.Module):
    """The velocity field of a FLUX model, for tokens."""

    HEAD: ClassVar[tuple[str, ...]] = ("final_layer",)
    """The children that come after the blocks; all other children but the blocks come before them."""

    config: Any
    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList

    @abstractmethod
    def forward(self, **inputs: Any) -> Tensor | State:
        """Velocity [B, L_img, channels] in the weights' dtype.

        Of a model that was cut into stages (`parallel/cut.py`), all but the first go on from `state`, what
        the stage before returned, and all but the last return theirs.
        """

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the double-stream blocks, then the single-stream blocks, in forward order."""
        for kind in ("double_blocks", "single_blocks"):
            for number, block in getattr(self, kind).named_children():
                yield f"{kind}.{number}", block

    def init_distributions(self) -> dict[str, Distribution]:
        """Initial values by parameter name, in the manner of DiT.

        Modulations and the final layer start at zero (each block is the identity), the embedders of the
        conditioning at N(0, 0.02), other matrices at Xavier's bound for each section on its own, biases at
        zero, norm scales at one.
        """
        distributions: dict[str, Distribution] = {}
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if name.endswith(".scale"):
                distributions[name] = Constant(1.0)
            elif name.endswith(".bias") or "mod" in name or name.startswith("final_layer."):
                distributions[name] = Constant(0.0)
            elif name.startswith(("time_in.", "guidance_in.", "vector_in.")):
                distributions[name] = Normal(0.02)
            elif isinstance(owner, FusedLinear) and len(owner.rows) > 1:
                fan_in = owner.in_features
                sections = tuple((rows, xavier_uniform(fan_in, rows)) for rows in owner.rows.values())
                distributions[name] = Rows(sections)
            else:
                distributions[name] = xavier_uniform(parameter.shape[1], parameter.shape[0])
        return distributions
