"""Long keys matter."""

from dataclasses import dataclass

from torch import Tensor

from ..roles import Batch, TokenScorer


@dataclass(frozen=True)
class ToyTokens(TokenScorer, name="toytokens"):
    """The longest keys are held with the most bits."""

    def weigh(self, batch: Batch) -> Tensor:
        length = batch.k.norm(dim=-1).mean(1)
        return length / length.amax(-1, keepdim=True)
