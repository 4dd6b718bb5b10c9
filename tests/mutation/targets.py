"""What is mutated, and in which files every mutant is noticed."""

from tests.mutation.engine_targets import ENGINE
from tests.mutation.federation_targets import FEDERATION
from tests.mutation.isolation_targets import ISOLATION
from tests.mutation.native_targets import NATIVE
from tests.mutation.target import Target

TARGETS: dict[str, Target] = {**ENGINE, **ISOLATION, **NATIVE, **FEDERATION}

# Files in which every mutant is noticed or written down: the tests draw their samples from these.
SETTLED_NATIVE = (
    "csrc/chacha20.h",
    "csrc/gaussian_blocks.h",
    "csrc/secret_key.cpp",
    "csrc/stream.h",
    "csrc/rounded_gaussian.h",
    "csrc/update_math.h",
    "csrc/cpu_kernels.h",
    "csrc/kernels.cpp",
    "csrc/bindings.cpp",
)
SETTLED = (
    "lora_dp/engine/fused_step.py",
    "lora_dp/privacy/randomness.py",
    "lora_dp/privacy/accounting/steps.py",
    "lora_dp/privacy/accounting/ledger.py",
    "lora_dp/privacy/accounting/history.py",
    "lora_dp/privacy/accounting/epsilon.py",
    "lora_dp/isolation/seeding.py",
    "lora_dp/isolation/collation/own_generators.py",
    "lora_dp/isolation/loss_checks/gradients.py",
    "lora_dp/fed/data/own_rows.py",
    "lora_dp/fed/data/own_data.py",
    "lora_dp/privacy/secret_state.py",
    "lora_dp/fed/flower/tensors.py",
    "lora_dp/privacy/cpu_draws.py",
    "lora_dp/isolation/model_state/parameters.py",
    "lora_dp/privacy/noise.py",
    "lora_dp/privacy/sampling.py",
    "lora_dp/isolation/batches/sizes.py",
    "lora_dp/isolation/batches/tables.py",
    "lora_dp/engine/recorder.py",
    "lora_dp/hash_chain.py",
    "lora_dp/lora/bypassed_layers.py",
    "lora_dp/fed/safe_text.py",
    "lora_dp/fed/data/unreadable.py",
    "lora_dp/isolation/model_state/buffers.py",
    "lora_dp/isolation/model_state/parts.py",
    "lora_dp/isolation/batches/lists.py",
    "lora_dp/engine/repeated_examples.py",
    "lora_dp/isolation/trials.py",
    "lora_dp/isolation/other_batches.py",
    "lora_dp/isolation/trial_values.py",
    "lora_dp/isolation/batches/calls.py",
    "lora_dp/isolation/batches/kinds.py",
    "lora_dp/isolation/batches/padding.py",
    "lora_dp/isolation/check.py",
    "lora_dp/isolation/batches/shared_arguments.py",
    "lora_dp/privacy/accounting/budget.py",
    "lora_dp/isolation/loss_checks/backward_calls.py",
)
