"""What the server does with the mean of a round, by name."""

from typing import Literal

ServerOptimizerName = Literal["average", "momentum", "adam"]
Averaging = Literal["none", "tail", "ema"]
