"""Ops, kernels and the native library: which tests are to notice a mutant of each file."""

from tests.mutation.target import Target

_PER_EXAMPLE = (
    "tests/ops/test_per_example_grad.py",
    "tests/ops/test_per_example_norm.py",
    "tests/ops/test_clipped_sum.py",
    "tests/ops/test_lora_forward.py",
    "tests/ops/test_lora_backward.py",
    "tests/ops/test_example_rows.py",
    "tests/ops/test_registry.py",
    "tests/nn/test_norms.py",
    "tests/ops/test_example_norms.py",
    "tests/nn/test_per_example.py",
    "tests/nn/test_backward_passes.py",
    "tests/engine/test_recorder.py",
    "tests/nn/test_precision.py",
    "tests/engine/test_gradients.py",
)
_NATIVE = (
    "tests/ops/test_chacha20.py",
    "tests/ops/test_sampling_bits.py",
    "tests/ops/test_native.py",
    "tests/ops/test_rounded_gaussian.py",
    "tests/ops/test_private_update.py",
    "tests/ops/test_update_refusals.py",
    "tests/ops/test_gaussian_pairs.py",
    "tests/ops/test_hostile_buffers.py",
    "tests/ops/test_hostile_updates.py",
    "tests/ops/test_hostile_tensors.py",
    "tests/privacy/test_noise.py",
    "tests/privacy/test_mechanism.py",
    "tests/privacy/test_draws.py",
    "tests/privacy/test_secret_keys.py",
    "tests/privacy/test_randomness.py",
    "tests/ops/test_noise_statistics.py",
    "tests/ops/test_emulated_cuda.py",
    "tests/ops/test_compiler_warnings.py",
)

NATIVE: dict[str, Target] = {
    "lora_dp/ops/example_norms.py": Target(
        (
            "tests/ops/test_example_norms.py",
            "tests/nn/test_norms.py",
            "tests/privacy/test_clipping.py",
            "tests/pitfalls/test_clipping.py",
            *_PER_EXAMPLE,
        )
    ),
    "lora_dp/ops/example_rows.py": Target(
        (
            "tests/nn/test_norms.py",
            "tests/ops/test_example_norms.py",
            "tests/engine/test_stray_values.py",
            *_PER_EXAMPLE,
        )
    ),
    "lora_dp/ops/clipped_sum.py": Target(_PER_EXAMPLE),
    "lora_dp/ops/per_example_norm.py": Target(_PER_EXAMPLE, ("tests/kernels/test_gram.py",)),
    "lora_dp/ops/per_example_grad.py": Target(_PER_EXAMPLE, ("tests/kernels/test_example_grad.py",)),
    "lora_dp/ops/rounded_gaussian.py": Target(
        (
            "tests/ops/test_rounded_gaussian.py",
            "tests/ops/test_hostile_buffers.py",
            "tests/ops/test_hostile_updates.py",
            "tests/ops/test_hostile_tensors.py",
            "tests/privacy/test_noise.py",
            "tests/privacy/test_mechanism.py",
        )
    ),
    "lora_dp/ops/sampling_bits.py": Target(
        (
            "tests/ops/test_sampling_bits.py",
            "tests/ops/test_chacha20.py",
            "tests/ops/test_native.py",
            "tests/privacy/test_randomness.py",
            "tests/ops/test_hostile_buffers.py",
            "tests/ops/test_hostile_updates.py",
            "tests/ops/test_hostile_tensors.py",
        )
    ),
    "lora_dp/ops/private_update.py": Target(
        (
            "tests/ops/test_private_update.py",
            "tests/ops/test_update_refusals.py",
            "tests/ops/test_native.py",
            "tests/ops/test_hostile_buffers.py",
            "tests/ops/test_hostile_updates.py",
            "tests/ops/test_hostile_tensors.py",
            "tests/engine/test_fused_step.py",
            "tests/ops/test_emulated_cuda.py",
            "tests/privacy/test_noise.py",
            "tests/privacy/test_mechanism.py",
        )
    ),
    "lora_dp/ops/clip_and_sum.py": Target((), ("tests/kernels/test_clip_sum.py", "tests/kernels/test_private_step.py")),
    "kernels/clip_sum.py": Target((), ("tests/kernels/test_clip_sum.py", "tests/kernels/test_private_step.py")),
    "kernels/noise_update.py": Target((), ("tests/kernels/test_noise_update.py", "tests/kernels/test_private_step.py")),
    "csrc/chacha20.h": Target(
        (
            "tests/ops/test_chacha20.py",
            "tests/ops/test_sampling_bits.py",
            "tests/ops/test_native.py",
            "tests/ops/test_rounded_gaussian.py",
            "tests/ops/test_compiler_warnings.py",
        )
    ),
    "csrc/cpu_kernels.h": Target(
        (
            "tests/ops/test_private_update.py",
            "tests/ops/test_update_refusals.py",
            "tests/ops/test_native.py",
            "tests/ops/test_rounded_gaussian.py",
            *_NATIVE,
        )
    ),
    "csrc/gaussian_blocks.h": Target(
        (
            "tests/ops/test_rounded_gaussian.py",
            "tests/ops/test_private_update.py",
            "tests/ops/test_update_refusals.py",
            "tests/ops/test_native.py",
        )
    ),
    "csrc/kernels.cpp": Target(
        (
            "tests/ops/test_chacha20.py",
            "tests/ops/test_sampling_bits.py",
            "tests/ops/test_native.py",
            "tests/ops/test_private_update.py",
            "tests/ops/test_update_refusals.py",
            "tests/privacy/test_secret_keys.py",
        )
    ),
    "csrc/rounded_gaussian.h": Target(
        (
            "tests/ops/test_gaussian_parts.py",
            "tests/ops/test_gaussian_pairs.py",
            "tests/ops/test_rounded_gaussian.py",
            "tests/ops/test_private_update.py",
            "tests/ops/test_update_refusals.py",
            "tests/ops/test_native.py",
            *_NATIVE,
        )
    ),
    "csrc/stream.h": Target(_NATIVE),
    "csrc/secret_key.cpp": Target(("tests/privacy/test_secret_keys.py", "tests/privacy/test_randomness.py")),
    "csrc/update_math.h": Target(
        ("tests/ops/test_private_update.py", "tests/ops/test_update_refusals.py", "tests/ops/test_native.py", *_NATIVE)
    ),
    "csrc/bindings.cpp": Target(
        (
            "tests/ops/test_hostile_buffers.py",
            "tests/ops/test_hostile_updates.py",
            "tests/ops/test_hostile_tensors.py",
            *_NATIVE,
        )
    ),
}
