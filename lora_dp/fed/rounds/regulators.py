"""Which factors' changes a method measures by their product, for noise on whole updates."""

from lora_dp.fed.methods import Method, State, factor
from lora_dp.nn.regulator import Regulator


def regulators(method: Method, state: State, round_index: int, turn: int) -> dict[str, Regulator]:
    """The regulator of each factor that the turn trains, by its name; none unless the method regulates its noise.

    Args:
        state: what the clients start from; the frozen factors are in it.
    """
    if not method.regulates_noise:
        return {}
    found = {}
    for name, tensor in state.items():
        which = factor(name)
        if which is not None and not method.trains(name, round_index, turn):
            trained = "A" if which == "B" else "B"
            found[name[:-1] + trained] = Regulator.beside(trained, tensor)  # type: ignore[arg-type]
    return found
