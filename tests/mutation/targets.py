"""What is mutated, and which tests are to notice: those of the module first, quick ones before slow ones."""

from dataclasses import dataclass

_PITFALLS = (
    "tests/test_pitfalls_noise.py", "tests/test_pitfalls_clipping.py", "tests/test_pitfalls_batches.py",
    "tests/test_pitfalls_accounting.py", "tests/test_pitfalls_coverage.py")
_PER_EXAMPLE = (
    "tests/ops/test_per_example.py", "tests/test_norms.py", "tests/test_recording.py", "tests/test_precision.py",
    "tests/test_gradients.py")
_NATIVE = (
    "tests/ops/test_chacha20.py", "tests/ops/test_rounded_gaussian.py", "tests/ops/test_private_update.py",
    "tests/ops/test_gaussian_pairs.py", "tests/ops/test_hostile_inputs.py", "tests/test_noise.py",
    "tests/test_draws.py", "tests/test_secret_keys.py", "tests/test_randomness.py",
    "tests/ops/test_noise_statistics.py", "tests/ops/test_emulated_cuda.py", "tests/ops/test_compiler_warnings.py")
_TRIALS = (
    "tests/test_batch_trials.py", "tests/test_isolation_trials.py", "tests/test_isolation_edges.py",
    "tests/test_isolation.py",
    "tests/test_pitfalls_coverage.py", "tests/test_carried_embeddings.py")
_LOSSES = (
    "tests/test_paired_losses.py", "tests/test_loss_watch.py",
    "tests/test_loss_vectors.py", "tests/test_kept_graph.py", "tests/test_isolation.py",
    "tests/test_batch_trials.py")
_SECRET_DRAWS = (
    "tests/test_secret_state.py", "tests/test_secret_fetch.py", "tests/test_cpu_draws.py", "tests/test_draws.py",
    "tests/test_drawing_ops.py")
_CHAINED = ("tests/fed/engines/test_chained_ledgers.py", "tests/fed/engines/test_flower_ledger.py")
_UNITS = ("tests/fed/test_units.py", "tests/fed/test_aggregation.py", "tests/fed/test_products.py",
          "tests/fed/test_methods.py", "tests/fed/test_faults.py", "tests/fed/test_secrets.py")


@dataclass(frozen=True)
class Target:
    """The tests of one file, in the order in which they run.

    Attributes:
        tests: files.
        interpreted: files that run after these, with Triton's kernels in its interpreter.
    """

    tests: tuple[str, ...]
    interpreted: tuple[str, ...] = ()


TARGETS: dict[str, Target] = {
    "lora_dp/mechanism.py": Target((
        "tests/test_noise.py", "tests/test_clipping.py", "tests/test_fused_step.py", "tests/test_pitfalls_noise.py",
        "tests/test_pitfalls_clipping.py"), ("tests/kernels/test_private_step.py",)),
    "lora_dp/clipping.py": Target((
        "tests/test_clipping.py", "tests/test_setup_refusals.py", "tests/test_pitfalls_clipping.py")),
    "lora_dp/noise.py": Target(("tests/test_noise.py", "tests/test_fused_step.py", "tests/test_pitfalls_noise.py")),
    "lora_dp/sampling.py": Target((
        "tests/test_sampling.py", "tests/test_unfetched.py", "tests/test_setup_refusals.py", "tests/test_collation.py",
        "tests/test_batches.py", "tests/test_pitfalls_batches.py", "tests/test_secret_fetch.py",
        "tests/test_repeats.py")),
    "lora_dp/collation.py": Target((
        "tests/test_collation.py", "tests/test_collated_rows.py", "tests/test_own_generators.py",
        "tests/test_batches.py", "tests/test_pitfalls_batches.py")),
    "lora_dp/collated_rows.py": Target(("tests/test_collated_rows.py", "tests/test_collation.py")),
    "lora_dp/collated_beside.py": Target(("tests/test_collated_rows.py", "tests/test_collation.py")),
    "lora_dp/collated_names.py": Target(("tests/test_collated_names.py",)),
    "lora_dp/batch_leaves.py": Target(("tests/test_batch_leaves.py", "tests/test_collated_rows.py")),
    "lora_dp/few_examples.py": Target((
        "tests/test_collation.py", "tests/test_collated_rows.py", "tests/test_collated_names.py")),
    "lora_dp/row_equality.py": Target(("tests/test_collation.py", "tests/test_collated_rows.py")),
    "lora_dp/own_generators.py": Target(("tests/test_own_generators.py",)),
    "lora_dp/accounting/epsilon.py": Target((
        "tests/test_loss_grid.py", "tests/test_accounting.py", "tests/test_accounting_grid.py")),
    "lora_dp/accounting/ledger.py": Target((
        "tests/test_accounting.py", "tests/test_resume.py", "tests/test_history.py",
        "tests/test_argument_types.py")),
    "lora_dp/accounting/history.py": Target(("tests/test_history.py", "tests/test_resume.py")),
    "lora_dp/accounting/planning.py": Target((
        "tests/test_planning.py", "tests/test_accounting.py", "tests/test_accounting_grid.py")),
    "lora_dp/accounting/steps.py": Target(("tests/test_accounting.py",)),
    "lora_dp/chain.py": Target(_CHAINED),
    "lora_dp/isolation.py": Target((
        "tests/test_choices.py", "tests/test_isolation_trials.py", "tests/test_isolation_edges.py",
        "tests/test_isolation.py", "tests/test_company.py", "tests/test_tables.py", "tests/test_batch_trials.py",
        "tests/test_coverage.py", "tests/test_pitfalls_coverage.py", "tests/test_number_lists.py",
        "tests/test_kept_buffers.py", "tests/test_own_losses.py", "tests/test_opened.py",
        "tests/test_larger_batches.py")),
    "lora_dp/company.py": Target((
        "tests/test_company.py", "tests/test_choices.py", "tests/test_tables.py", "tests/test_isolation_trials.py",
        "tests/test_isolation_edges.py", "tests/test_batch_trials.py", "tests/test_kept_buffers.py",
        "tests/test_own_losses.py", "tests/test_larger_batches.py", "tests/test_shared_arguments.py")),
    "lora_dp/trial_values.py": Target((
        "tests/test_trial_values.py", "tests/test_choices.py", "tests/test_company.py",
        "tests/test_isolation_trials.py")),
    "lora_dp/seeded.py": Target((
        "tests/test_seeded.py", "tests/test_collation.py", "tests/test_own_generators.py",
        "tests/test_isolation_trials.py")),
    "lora_dp/kept_buffers.py": Target(("tests/test_kept_buffers.py",)),
    "lora_dp/model_parts.py": Target(("tests/test_model_parts.py", "tests/test_unwritten.py", "tests/test_beside.py")),
    "lora_dp/number_lists.py": Target(("tests/test_number_lists.py", "tests/test_opened.py", "tests/test_tables.py")),
    "lora_dp/opened.py": Target((
        "tests/test_opened.py", "tests/test_opened_objects.py", "tests/test_opened_settings.py",
        "tests/test_collated_rows.py")),
    "lora_dp/repeats.py": Target(("tests/test_repeats.py",)),
    "lora_dp/fed/split_files.py": Target(("tests/fed/test_split_files.py", "tests/fed/test_data.py")),
    "lora_dp/unwritten.py": Target((
        "tests/test_unwritten.py", "tests/test_beside.py", "tests/test_kept_buffers.py")),
    "lora_dp/loss_rows.py": Target((
        "tests/test_loss_rows.py", "tests/test_loss_vectors.py", "tests/test_loss_watch.py")),
    "lora_dp/trials.py": Target((
        *_TRIALS, "tests/test_company.py", "tests/test_model_parts.py", "tests/test_own_losses.py")),
    "lora_dp/batch_parts.py": Target((
        "tests/test_batch_parts.py", "tests/test_order.py", "tests/test_choices.py", "tests/test_tables.py", *_TRIALS)),
    "lora_dp/sizes.py": Target(("tests/test_tables.py", "tests/test_batch_trials.py")),
    "lora_dp/shared_arguments.py": Target(("tests/test_shared_arguments.py", "tests/test_batch_trials.py")),
    "lora_dp/tables.py": Target(("tests/test_tables.py", "tests/test_batch_parts.py")),
    "lora_dp/still.py": Target(("tests/test_drawing_ops.py", "tests/test_batch_trials.py")),
    "lora_dp/bypassed.py": Target(("tests/test_bypassed.py",)),
    "lora_dp/coverage.py": Target((
        "tests/test_coverage.py", "tests/test_frozen_later.py", "tests/test_stray_values.py",
        "tests/test_setup_refusals.py", "tests/test_beside.py", "tests/test_unwritten.py",
        "tests/test_pitfalls_coverage.py", "tests/test_ownership.py", "tests/test_passes.py",
        "tests/test_arguments.py", "tests/test_compile.py")),
    "lora_dp/loss_graph.py": Target((
        "tests/test_loss_graph.py", "tests/test_loss_rows.py", "tests/test_beside.py", "tests/test_own_losses.py",
        *_LOSSES)),
    "lora_dp/own_scales.py": Target((
        "tests/test_own_scales.py", "tests/test_own_losses.py", "tests/test_loss_graph.py",
        "tests/test_loss_watch.py")),
    "lora_dp/loss_watch.py": Target((
        "tests/test_beside.py", "tests/test_loss_watch.py", "tests/test_unwritten.py", *_LOSSES[1:],
        "tests/test_reentrant.py", "tests/test_compile.py", "tests/test_paired_losses.py",
        "tests/test_own_losses.py", "tests/test_own_scales.py")),
    "lora_dp/losses.py": Target(("tests/test_losses.py", "tests/test_arguments.py")),
    "lora_dp/passes.py": Target((
        "tests/test_passes.py", "tests/test_larger_batches.py", "tests/test_tables.py", "tests/test_choices.py",
        "tests/test_kept_buffers.py", "tests/test_number_lists.py",
        "tests/test_model_parts.py", "tests/test_beside.py", "tests/test_company.py", "tests/test_unwritten.py",
        "tests/test_recording.py", "tests/test_loss_vectors.py", "tests/test_training_loops.py",
        "tests/test_ownership.py",
        "tests/test_kept_graph.py", "tests/test_reentrant.py", "tests/test_batch_trials.py",
        "tests/test_frozen_later.py", "tests/test_drawn.py", "tests/test_secret_state.py", "tests/test_compile.py")),
    "lora_dp/recording.py": Target((
        "tests/test_recording.py", "tests/test_phases.py", "tests/test_kept_graph.py", "tests/test_reentrant.py",
        "tests/test_ownership.py", "tests/test_training_loops.py", "tests/test_gradients.py",
        "tests/test_bypassed.py", "tests/test_unwritten.py", "tests/test_drawn.py")),
    "lora_dp/drawn.py": Target(("tests/test_drawn.py", "tests/test_batches.py", "tests/test_collation.py")),
    "lora_dp/fused_step.py": Target((
        "tests/test_fused_step.py", "tests/test_noise.py", "tests/test_resume.py", "tests/test_phases.py",
        "tests/test_pitfalls_noise.py"), ("tests/kernels/test_private_step.py",)),
    "lora_dp/optimizer.py": Target((
        "tests/test_optimizer.py", "tests/test_engine.py", "tests/test_batches.py", "tests/test_drawn.py",
        "tests/test_training_loops.py", "tests/test_ownership.py", "tests/test_unwritten.py",
        "tests/test_secret_state.py", "tests/test_resume.py",
        "tests/test_phases.py", "tests/test_filtering.py", "tests/test_regulator.py",
        "tests/test_stray_values.py", "tests/test_setup_refusals.py", "tests/test_arguments.py",
        "tests/test_loss_vectors.py", "tests/test_gradients.py", "tests/test_collation.py", "tests/test_recording.py",
        "tests/test_fused_step.py", "tests/test_loss_watch.py", *_PITFALLS)),
    "lora_dp/randomness.py": Target((
        "tests/test_randomness.py", "tests/test_draws.py", "tests/test_secret_keys.py", "tests/test_noise.py",
        "tests/test_resume.py")),
    "lora_dp/secret_state.py": Target(_SECRET_DRAWS),
    "lora_dp/cpu_draws.py": Target((
        "tests/test_cpu_draws.py", "tests/test_secret_state.py", "tests/test_drawing_ops.py")),
    "lora_dp/ops/example_norms.py": Target((
        "tests/test_norms.py", "tests/test_clipping.py", "tests/test_pitfalls_clipping.py", *_PER_EXAMPLE)),
    "lora_dp/ops/example_rows.py": Target(("tests/test_norms.py", "tests/test_stray_values.py", *_PER_EXAMPLE)),
    "lora_dp/ops/clipped_sum.py": Target(_PER_EXAMPLE),
    "lora_dp/ops/per_example_norm.py": Target(_PER_EXAMPLE, ("tests/kernels/test_gram.py",)),
    "lora_dp/ops/per_example_grad.py": Target(_PER_EXAMPLE, ("tests/kernels/test_example_grad.py",)),
    "lora_dp/ops/rounded_gaussian.py": Target((
        "tests/ops/test_rounded_gaussian.py", "tests/ops/test_hostile_inputs.py", "tests/test_noise.py")),
    "lora_dp/ops/sampling_bits.py": Target((
        "tests/ops/test_chacha20.py", "tests/test_randomness.py", "tests/ops/test_hostile_inputs.py")),
    "lora_dp/ops/private_update.py": Target((
        "tests/ops/test_private_update.py", "tests/ops/test_hostile_inputs.py", "tests/test_fused_step.py",
        "tests/ops/test_emulated_cuda.py", "tests/test_noise.py")),
    "lora_dp/ops/clip_and_sum.py": Target((), ("tests/kernels/test_clip_sum.py", "tests/kernels/test_private_step.py")),
    "kernels/clip_sum.py": Target((), ("tests/kernels/test_clip_sum.py", "tests/kernels/test_private_step.py")),
    "kernels/noise_update.py": Target((), ("tests/kernels/test_noise_update.py", "tests/kernels/test_private_step.py")),
    "lora_dp/fed/account.py": Target((
        "tests/fed/test_ahead_log.py", "tests/fed/test_origin.py", "tests/fed/test_account.py",
        "tests/fed/test_runner.py", "tests/fed/test_resume.py", "tests/fed/test_units.py")),
    "lora_dp/fed/origin.py": Target(("tests/fed/test_origin.py", "tests/fed/engines/test_flower_ledger.py")),
    "lora_dp/fed/client.py": Target((
        "tests/fed/test_client.py", "tests/fed/test_contained.py", "tests/fed/test_secrets.py",
        "tests/fed/test_units.py", "tests/fed/test_centralised.py")),
    "lora_dp/fed/noisy_sum.py": Target(("tests/fed/test_noisy_sum.py", "tests/fed/test_units.py")),
    "lora_dp/fed/contained.py": Target((
        "tests/fed/test_contained.py", "tests/fed/test_one_shape.py", "tests/fed/test_units.py",
        "tests/fed/test_secrets.py")),
    "lora_dp/fed/one_shape.py": Target(("tests/fed/test_one_shape.py",)),
    "lora_dp/fed/unreadable.py": Target((
        "tests/fed/test_unreadable.py",
        "tests/fed/test_contained.py", "tests/fed/test_examples.py", "tests/fed/test_secrets.py",
        "tests/fed/test_data.py", "tests/fed/test_own_data.py")),
    "lora_dp/fed/own_data.py": Target((
        "tests/fed/test_own_data.py", "tests/fed/test_split_files.py", "tests/fed/engines/test_own_examples.py")),
    "lora_dp/fed/own_rows.py": Target(("tests/fed/test_own_data.py",)),
    "lora_dp/fed/harmless.py": Target((
        "tests/fed/test_harmless.py", "tests/fed/engines/test_hostile_client.py",
        "tests/fed/engines/test_hostile_server.py", "tests/fed/test_contained.py")),
    "lora_dp/fed/privacy.py": Target(("tests/fed/test_privacy.py", "tests/fed/test_account.py", *_UNITS)),
    "lora_dp/fed/federation.py": Target((
        "tests/fed/test_federation.py", "tests/fed/test_client.py", "tests/fed/test_contained.py", *_UNITS,
        "tests/fed/test_account.py", "tests/fed/test_checkpoint.py")),
    "lora_dp/fed/engines/flower_ledger.py": Target((
        "tests/fed/engines/test_own_paths.py", "tests/fed/engines/test_flower_ledger.py",
        "tests/fed/engines/test_chained_ledgers.py")),
    "lora_dp/fed/engines/flower_policy.py": Target((
        "tests/fed/engines/test_policy.py", "tests/fed/engines/test_hostile_server.py",
        "tests/fed/engines/test_flower_ledger.py", "tests/fed/engines/test_flower.py")),
    "lora_dp/fed/engines/flower_tensors.py": Target((
        "tests/fed/engines/test_tensor_bytes.py", "tests/fed/engines/test_hostile_client.py",
        "tests/fed/engines/test_message_bytes.py")),
    "csrc/chacha20.h": Target((
        "tests/ops/test_chacha20.py", "tests/ops/test_rounded_gaussian.py", "tests/ops/test_compiler_warnings.py")),
    "csrc/cpu_kernels.h": Target(("tests/ops/test_private_update.py", "tests/ops/test_rounded_gaussian.py", *_NATIVE)),
    "csrc/gaussian_blocks.h": Target(("tests/ops/test_rounded_gaussian.py", "tests/ops/test_private_update.py")),
    "csrc/kernels.cpp": Target((
        "tests/ops/test_chacha20.py", "tests/ops/test_private_update.py", "tests/test_secret_keys.py")),
    "csrc/rounded_gaussian.h": Target((
        "tests/ops/test_gaussian_parts.py", "tests/ops/test_gaussian_pairs.py", "tests/ops/test_rounded_gaussian.py",
        "tests/ops/test_private_update.py", *_NATIVE)),
    "csrc/stream.h": Target(_NATIVE),
    "csrc/secret_key.cpp": Target(("tests/test_secret_keys.py", "tests/test_randomness.py")),
    "csrc/update_math.h": Target(("tests/ops/test_private_update.py", *_NATIVE)),
    "csrc/bindings.cpp": Target(("tests/ops/test_hostile_inputs.py", *_NATIVE)),
}

# Files in which every mutant is noticed or written down: the tests draw their samples from these.
SETTLED_NATIVE = (
    "csrc/chacha20.h", "csrc/gaussian_blocks.h", "csrc/secret_key.cpp", "csrc/stream.h", "csrc/rounded_gaussian.h",
    "csrc/update_math.h", "csrc/cpu_kernels.h", "csrc/kernels.cpp", "csrc/bindings.cpp")
SETTLED = (
    "lora_dp/mechanism.py", "lora_dp/clipping.py", "lora_dp/fed/noisy_sum.py", "lora_dp/fused_step.py",
    "lora_dp/losses.py", "lora_dp/randomness.py", "lora_dp/accounting/steps.py", "lora_dp/accounting/ledger.py",
    "lora_dp/accounting/history.py", "lora_dp/accounting/epsilon.py", "lora_dp/accounting/planning.py",
    "lora_dp/seeded.py", "lora_dp/own_generators.py", "lora_dp/loss_rows.py", "lora_dp/fed/origin.py",
    "lora_dp/fed/own_rows.py", "lora_dp/fed/own_data.py", "lora_dp/fed/privacy.py", "lora_dp/fed/one_shape.py",
    "lora_dp/secret_state.py", "lora_dp/fed/engines/flower_tensors.py", "lora_dp/cpu_draws.py", "lora_dp/unwritten.py",
    "lora_dp/noise.py", "lora_dp/sampling.py", "lora_dp/sizes.py", "lora_dp/tables.py", "lora_dp/recording.py",
    "lora_dp/chain.py", "lora_dp/bypassed.py", "lora_dp/fed/harmless.py", "lora_dp/fed/unreadable.py",
    "lora_dp/fed/contained.py", "lora_dp/fed/federation.py", "lora_dp/fed/engines/flower_policy.py",
    "lora_dp/fed/client.py", "lora_dp/coverage.py", "lora_dp/kept_buffers.py", "lora_dp/model_parts.py",
    "lora_dp/number_lists.py", "lora_dp/repeats.py", "lora_dp/fed/account.py", "lora_dp/fed/engines/flower_ledger.py",
    "lora_dp/trials.py", "lora_dp/company.py", "lora_dp/trial_values.py", "lora_dp/batch_parts.py",
    "lora_dp/isolation.py", "lora_dp/shared_arguments.py", "lora_dp/drawn.py", "lora_dp/passes.py")
