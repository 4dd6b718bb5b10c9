"""Opacus' names for what is called otherwise here: whoever writes one is told what to write instead."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar, cast

T = TypeVar("T", bound=Callable[..., Any])

OF_PACKAGE = {
    "get_noise_multiplier": "calibrate_noise_multiplier(target_epsilon, target_delta, sample_rate, steps)",
    "GradSampleModule": "inject_lora(model, config), and make_private, which wraps nothing",
    "ModuleValidator": "PrivacyEngine().make_private, which refuses by name what it cannot make private",
    "DPDataLoader": "PrivacyEngine().make_private, which returns the private loader",
    "DPOptimizer": "PrivacyEngine().make_private, which returns the private optimizer",
}
OF_CALIBRATION = {
    "epochs": "give steps, which are epochs / sample_rate, rounded up",
    "epsilon_tolerance": "leave it out, for the noise found is within 0.1 % of ε and never above it",
}
OF_NEW_ENGINE = {"secure_mode": "leave it out, for noise and sampling are secure unless there is a reproducible_seed"}
OF_MAKE_PRIVATE = {
    "module": "give it as model=…",
    "poisson_sampling": "leave it out, for batches are always drawn by Poisson sampling, on which ε rests",
    "grad_sample_mode": "leave it out; norm_method='direct' or 'ghost' chooses how norms are computed",
    "batch_first": "leave it out, and put the examples into the first dimension",
    "criterion": "leave it out, and hand one loss for each example to optimizer.backward",
    "noise_generator": "leave it out, or make PrivacyEngine(reproducible_seed=…) for research",
    "wrap_model": "leave it out, for the model stays the very same object",
}
OF_OPTIMIZER = {
    "attach_step_hook": "optimizer.register_step_post_hook(hook), which is called with (optimizer, args, kwargs)",
    "grad_samples": "nothing, for gradients of single examples are gone after the step that clips them",
    "accumulated_iterations": "nothing, for losses are of single examples and are divided by nothing",
    "secure_mode": "nothing, for noise and sampling are secure unless the engine has a reproducible_seed",
    "original_optimizer_state": "optimizer.state_dict()",
}
OF_ENGINE = {
    "is_compatible": "make_private, which refuses by name what it cannot make private",
    "validate": "make_private, which refuses by name what it cannot make private",
    "secure_mode": "PrivacyEngine(), which is secure unless it has a reproducible_seed",
    "get_privacy_spent": "engine.get_epsilon(delta)",
}
OF_ACCOUNTANT = {
    "history": "engine.ledger.entries, the steps in order with how many there are of each",
    "step": "nothing, for the optimizer counts every step before it is released",
    "get_epsilon": "engine.get_epsilon(delta)",
    "mechanism": "engine.accountant, which is its name",
    "state_dict": "engine.state_dict()",
    "load_state_dict": "engine.load_state_dict(state)",
}


class AccountantName(str):
    """ "pld" or "rdp": a string that tells who looks for Opacus' accountant in it where that is.

    >>> AccountantName("pld") == "pld"
    True
    >>> AccountantName("pld").history
    Traceback (most recent call last):
    AttributeError: 'history' is Opacus' name: write engine.ledger.entries, the steps in order ...
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise_for(self, name, OF_ACCOUNTANT)


def raise_for(holder: object, name: str, told: Mapping[str, str]) -> NoReturn:
    """Raise AttributeError for an attribute that there is not, with the remedy where ``told`` has one.

    >>> raise_for(object(), "grad_samples", OF_OPTIMIZER)
    Traceback (most recent call last):
    AttributeError: 'grad_samples' is Opacus' name: write nothing, for gradients of single examples are gone ...
    """
    if name in told:
        raise AttributeError(f"'{name}' is Opacus' name: write {told[name]}.")
    raise AttributeError(f"'{type(holder).__name__}' has no '{name}'.")


def tells_users_of(library: str, told: Mapping[str, str]) -> Callable[[T], T]:
    """A decorator: the function refuses the arguments that ``told`` has, with what to write instead.

    >>> tells_users_of("Opacus", OF_MAKE_PRIVATE)(lambda **options: None)(poisson_sampling=False)
    Traceback (most recent call last):
    TypeError: 'poisson_sampling' is an argument of Opacus': leave it out, for batches are always drawn by Poisson ...
    """

    def decorated(function: T) -> T:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in told:
                    raise TypeError(f"'{name}' is an argument of {library}': {told[name]}.")
            return function(*args, **kwargs)

        return cast(T, checked)

    return decorated
