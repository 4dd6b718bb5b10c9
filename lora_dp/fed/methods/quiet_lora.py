"""QuietLoRA, our own: few trained numbers on features that fit them, and noise that is averaged before it is used."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lora_dp.fed.methods.head_only import HeadOnly
from lora_dp.fed.methods.lora_xs import LoRAXS


class QuietLoRA(LoRAXS):
    """LoRA-XS cores in the last block beside a head on features of unit length, in rounds of one large step.

    What is private costs noise once: a release of class sums centres and scales the features, and the rest of the
    budget goes to few steps. docs/explanation/quiet-lora.md derives the parts, and says when it loses.
    """

    name = "quiet-lora"
    adapts_last: ClassVar[int | None] = 1
    # The cores' output is scaled by 1/r: their noise reaches the logits through more than the head's does.
    recipe: ClassVar[Mapping[str, Any]] = {**HeadOnly.recipe, "alpha": 1.0}
    recipe_rates: ClassVar = HeadOnly.recipe_rates
