"""Every op of torch that may draw from a generator, found by its schema, and a call of each on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def schemas() -> dict[str, Any]:
    """Schemas by full name: those with an argument for a generator, and those that torch marks as drawing."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        if draws(schema) and name not in NO_OPS:
            found[name] = schema
    return found


def draws(schema: Any) -> bool:
    if any("Generator" in str(argument.type) for argument in schema.arguments):
        return True
    try:
        return torch.Tag.nondeterministic_seeded in op(schema).tags
    except (AttributeError, RuntimeError):  # of TorchScript alone
        return False


def op(schema: Any) -> Any:
    namespace, name = schema.name.split("::")
    return getattr(getattr(getattr(torch.ops, namespace), name), schema.overload_name or "default")


def takes_generator(schema: Any) -> bool:
    return any("Generator" in str(argument.type) for argument in schema.arguments)


# What is no op of the dispatcher: TorchScript's own words for functions that are made of ops.
NO_OPS = (
    "aten::_no_grad_normal_",
    "aten::_no_grad_uniform_",
    "aten::initial_seed",
    "aten::manual_seed.generator",
    "aten::seed",
    "inductor_prims::inductor_reserve_rng_state",
)
# What draws nothing from a generator of the CPU, and why.
FOR_OTHER_DEVICES = (
    "aten::_cudnn_attention_backward",
    "aten::_cudnn_attention_forward",
    "aten::_cudnn_init_dropout_state",
    "aten::_cudnn_init_dropout_state.out",
    "aten::_cudnn_rnn",
    "aten::_cudnn_rnn.out",
    "aten::_efficient_attention_forward",
    "aten::_fill_mem_eff_dropout_mask_",
    "aten::_flash_attention_forward",
    "aten::_flash_attention_forward.quantized",
    "aten::_flash_attention_forward_no_dropout_inplace",
    "aten::_fused_dropout",
    "aten::_fused_dropout.out",
    "aten::_lstm_mps",
    "aten::_lstm_mps.out",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention.quantized",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_triton_scaled_dot_attention",
    "aten::_triton_scaled_dot_attention.out",
    "aten::miopen_rnn",
    "aten::miopen_rnn.out",
    "rngprims::philox_rand",
)
WITHOUT_DRAWS = {
    "aten::_fused_sdp_choice": "a number that names a kernel",
    "aten::_nested_tensor_softmax_with_shape": "a softmax, marked by mistake",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "takes no dropout but 0",
}


def drawing() -> dict[str, Any]:
    """Schemas of all that draw on a CPU, by full name."""
    return {
        name: schema
        for name, schema in schemas().items()
        if name not in FOR_OTHER_DEVICES and name not in WITHOUT_DRAWS
    }


def call(schema: Any, rows: int = 6, generator: torch.Generator | None = None) -> Callable[[], Any]:
    """A call that draws, with :func:`arguments`."""
    values = arguments(schema, rows)
    if generator is not None:
        values["generator"] = generator
    args = [values[argument.name] for argument in schema.arguments if not argument.kwarg_only]
    named = {argument.name: values[argument.name] for argument in schema.arguments if argument.kwarg_only}
    return lambda: op(schema)(*args, **named)


def arguments(schema: Any, rows: int = 6) -> dict[str, Any]:
    """All arguments of a call that draws (rows, 4) numbers or more, of every row alike."""
    return _recurrent(schema.name, rows) | {
        argument.name: _value(schema, argument, rows)
        for argument in schema.arguments
        if argument.name not in _RECURRENT
    }


_RECURRENT = ("hx", "params", "batch_sizes", "data", "has_biases", "num_layers", "bidirectional", "batch_first")
_NUMBERS = {
    "p": 0.5,
    "dropout": 0.5,
    "dropout_p": 0.5,
    "train": True,
    "training": True,
    "mean": 0.25,
    "std": 1.0,
    "from": 0,
    "to": 9,
    "low": 2,
    "high": 9,
    "n": 6,
    "num_samples": 3,
    "replacement": False,
    "median": 0.5,
    "sigma": 1.0,
    "lambd": 2.0,
    "lower": 0.125,
    "upper": 0.375,
    "is_causal": False,
    "enable_gqa": False,
    "requires_grad": False,
}


def _value(schema: Any, argument: Any, rows: int) -> Any:
    name, kind = argument.name, str(argument.type)
    if name in ("dtype", "device") and "prims" in schema.name:
        return torch.float32 if name == "dtype" else torch.device("cpu")
    if name.startswith("out") and kind == "Tensor":
        if "multinomial" in schema.name or "randperm" in schema.name:
            return torch.empty(0, dtype=torch.int64)
        # Of the right size: torch resizes not all of them.
        return torch.empty(rows, 4, dtype=torch.bool if name == "out1" else torch.float32)
    if kind == "Tensor":
        return _tensor(schema.name, name, rows)
    if name in ("size", "shape"):
        return [rows, 4]
    if name == "stride":
        return [4, 1]
    if name == "n":
        return rows
    return _NUMBERS.get(name) if name in _NUMBERS else argument.default_value


def _tensor(op_name: str, name: str, rows: int) -> Tensor:
    if name in ("query", "key", "value"):
        return torch.full((rows, 2, 4, 8), 0.5)
    if name == "high":
        return torch.tensor(9)
    if "rrelu" in op_name:
        return torch.zeros(rows, 4) if name == "noise" else torch.full((rows, 4), -0.5)
    if name == "input" and op_name.split("::")[1] in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return torch.full((rows, 3, 4), 0.5)
    return torch.full((rows, 4), 9.0 if name == "count" else 0.5)


def _recurrent(op_name: str, rows: int) -> dict[str, Any]:
    """Two layers, with dropout between them."""
    kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
    kind: Any = kinds.get(op_name.split("::")[1])
    if kind is None:
        return {}
    start = torch.zeros(2, rows, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = [weight.detach() for weight in kind(4, 4, 2)._flat_weights]
    return {
        "hx": [start, start] if kind is nn.LSTM else start,
        "params": weights,
        "has_biases": True,
        "num_layers": 2,
        "bidirectional": False,
        "batch_first": True,
        "data": torch.full((3 * rows, 4), 0.5),
        "batch_sizes": torch.tensor([rows] * 3),
    }
