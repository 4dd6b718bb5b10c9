"""Layers, privacy and engine: which tests are to notice a mutant of each file."""

from tests.mutation.target import Target

_PITFALLS = (
    "tests/pitfalls/test_noise.py",
    "tests/pitfalls/test_clipping.py",
    "tests/pitfalls/test_batches.py",
    "tests/pitfalls/test_accounting.py",
    "tests/pitfalls/test_coverage.py",
)
_SECRET_DRAWS = (
    "tests/privacy/test_secret_state.py",
    "tests/privacy/test_secret_cuda_state.py",
    "tests/privacy/test_seeds_in_forward.py",
    "tests/engine/test_secret_fetch.py",
    "tests/privacy/test_cpu_draws.py",
    "tests/privacy/test_draws.py",
    "tests/privacy/test_drawing_ops.py",
    "tests/isolation/test_deterministic.py",
)
_CHAINED = (
    "tests/test_hash_chain.py",
    "tests/fed/flower/test_chained_ledgers.py",
    "tests/fed/flower/test_ledger.py",
    "tests/fed/flower/test_keys.py",
)

ENGINE: dict[str, Target] = {
    "lora_dp/privacy/mechanism.py": Target(
        (
            "tests/privacy/test_mechanism.py",
            "tests/privacy/test_noise.py",
            "tests/privacy/test_clipping.py",
            "tests/engine/test_fused_step.py",
            "tests/pitfalls/test_noise.py",
            "tests/pitfalls/test_clipping.py",
        ),
        ("tests/kernels/test_private_step.py",),
    ),
    "lora_dp/privacy/adaptive_clipping.py": Target(
        ("tests/privacy/test_adaptive_clipping.py", "tests/engine/test_moving_bound.py")
    ),
    "lora_dp/privacy/correlated_noise.py": Target(
        ("tests/privacy/test_correlated_noise.py", "tests/engine/test_cycle.py")
    ),
    "lora_dp/privacy/cyclic_sampling.py": Target(
        ("tests/privacy/test_cyclic_sampling.py", "tests/engine/test_cycle.py")
    ),
    "lora_dp/engine/cycle.py": Target(("tests/engine/test_cycle.py",)),
    "lora_dp/privacy/clipping.py": Target(
        ("tests/privacy/test_clipping.py", "tests/engine/test_setup_refusals.py", "tests/pitfalls/test_clipping.py")
    ),
    "lora_dp/privacy/noise.py": Target(
        (
            "tests/privacy/test_noise.py",
            "tests/privacy/test_mechanism.py",
            "tests/engine/test_fused_step.py",
            "tests/pitfalls/test_noise.py",
        )
    ),
    "lora_dp/privacy/sampling.py": Target(
        (
            "tests/privacy/test_sampling.py",
            "tests/engine/test_data_loader.py",
            "tests/engine/test_unfetched.py",
            "tests/engine/test_setup_refusals.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/engine/test_batches.py",
            "tests/pitfalls/test_batches.py",
            "tests/engine/test_secret_fetch.py",
            "tests/engine/test_repeated_examples.py",
        )
    ),
    "lora_dp/engine/data_loader.py": Target(
        (
            "tests/engine/test_data_loader.py",
            "tests/privacy/test_sampling.py",
            "tests/engine/test_unfetched.py",
            "tests/engine/test_setup_refusals.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/engine/test_batches.py",
            "tests/pitfalls/test_batches.py",
            "tests/engine/test_secret_fetch.py",
            "tests/engine/test_repeated_examples.py",
        )
    ),
    "lora_dp/privacy/accounting/epsilon.py": Target(
        (
            "tests/privacy/accounting/test_loss_grid.py",
            "tests/privacy/accounting/test_epsilon.py",
            "tests/privacy/accounting/test_planning.py",
            "tests/privacy/accounting/test_ledger.py",
            "tests/privacy/accounting/test_steps.py",
            "tests/privacy/accounting/test_grid.py",
        )
    ),
    "lora_dp/privacy/accounting/ledger.py": Target(
        (
            "tests/privacy/accounting/test_ledger.py",
            "tests/privacy/accounting/test_epsilon.py",
            "tests/privacy/accounting/test_planning.py",
            "tests/privacy/accounting/test_steps.py",
            "tests/engine/test_resume.py",
            "tests/privacy/accounting/test_history.py",
            "tests/test_argument_types.py",
        )
    ),
    "lora_dp/privacy/accounting/budget.py": Target(
        ("tests/privacy/accounting/test_budget.py", "tests/engine/test_engine.py", "tests/engine/test_stray_values.py")
    ),
    "lora_dp/privacy/accounting/history.py": Target(
        ("tests/privacy/accounting/test_history.py", "tests/engine/test_resume.py")
    ),
    "lora_dp/privacy/accounting/planning.py": Target(
        (
            "tests/privacy/accounting/test_planning.py",
            "tests/privacy/accounting/test_epsilon.py",
            "tests/privacy/accounting/test_ledger.py",
            "tests/privacy/accounting/test_steps.py",
            "tests/privacy/accounting/test_grid.py",
        )
    ),
    "lora_dp/privacy/accounting/steps.py": Target(
        (
            "tests/privacy/accounting/test_steps.py",
            "tests/privacy/accounting/test_epsilon.py",
            "tests/privacy/accounting/test_planning.py",
            "tests/privacy/accounting/test_ledger.py",
        )
    ),
    "lora_dp/hash_chain.py": Target(_CHAINED),
    "lora_dp/engine/repeated_examples.py": Target(("tests/engine/test_repeated_examples.py",)),
    "lora_dp/lora/bypassed_layers.py": Target(("tests/lora/test_bypassed_layers.py",)),
    "lora_dp/engine/validation.py": Target(
        (
            "tests/engine/test_validation.py",
            "tests/engine/test_frozen_later.py",
            "tests/engine/test_stray_values.py",
            "tests/engine/test_setup_refusals.py",
            "tests/engine/test_beside.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/pitfalls/test_coverage.py",
            "tests/engine/test_ownership.py",
            "tests/engine/test_hooks.py",
            "tests/test_argument_checks.py",
            "tests/engine/test_fixed_settings.py",
            "tests/engine/test_foreign_wrappers.py",
            "tests/engine/test_compile.py",
        )
    ),
    "lora_dp/losses.py": Target(
        (
            "tests/test_losses.py",
            "tests/test_argument_checks.py",
            "tests/engine/test_fixed_settings.py",
            "tests/engine/test_foreign_wrappers.py",
        )
    ),
    "lora_dp/engine/hooks.py": Target(
        (
            "tests/engine/test_hooks.py",
            "tests/isolation/test_larger_batches.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/model_state/test_buffers.py",
            "tests/isolation/batches/test_lists.py",
            "tests/isolation/model_state/test_parts.py",
            "tests/engine/test_beside.py",
            "tests/isolation/test_other_batches.py",
            "tests/isolation/test_widths.py",
            "tests/isolation/test_tried_again.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/nn/test_per_example.py",
            "tests/nn/test_backward_passes.py",
            "tests/engine/test_recorder.py",
            "tests/isolation/loss_checks/test_loss_vectors.py",
            "tests/isolation/loss_checks/test_padded_widths.py",
            "tests/engine/test_training_loops.py",
            "tests/engine/test_ownership.py",
            "tests/nn/test_kept_graph.py",
            "tests/nn/test_reentrant.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
            "tests/engine/test_frozen_later.py",
            "tests/engine/test_logical_batch.py",
            "tests/privacy/test_secret_state.py",
            "tests/privacy/test_secret_cuda_state.py",
            "tests/privacy/test_seeds_in_forward.py",
            "tests/engine/test_compile.py",
        )
    ),
    "lora_dp/nn/per_example.py": Target(
        (
            "tests/nn/test_per_example.py",
            "tests/nn/test_backward_passes.py",
            "tests/engine/test_recorder.py",
            "tests/engine/test_phases.py",
            "tests/nn/test_kept_graph.py",
            "tests/nn/test_reentrant.py",
            "tests/engine/test_ownership.py",
            "tests/engine/test_training_loops.py",
            "tests/engine/test_gradients.py",
            "tests/lora/test_bypassed_layers.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/engine/test_logical_batch.py",
        )
    ),
    "lora_dp/engine/recorder.py": Target(
        (
            "tests/engine/test_recorder.py",
            "tests/nn/test_per_example.py",
            "tests/nn/test_backward_passes.py",
            "tests/engine/test_phases.py",
            "tests/nn/test_kept_graph.py",
            "tests/nn/test_reentrant.py",
            "tests/engine/test_ownership.py",
            "tests/engine/test_training_loops.py",
            "tests/engine/test_gradients.py",
            "tests/lora/test_bypassed_layers.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/engine/test_logical_batch.py",
        )
    ),
    "lora_dp/engine/pass_clipper.py": Target(
        (
            "tests/engine/test_pass_clipper.py",
            "tests/engine/test_views.py",
            "tests/engine/test_engine.py",
            "tests/isolation/loss_checks/test_loss_vectors.py",
            "tests/engine/test_gradients.py",
        )
    ),
    "lora_dp/engine/logical_batch.py": Target(
        (
            "tests/engine/test_logical_batch.py",
            "tests/engine/test_optimizer.py",
            "tests/engine/test_skipped_batches.py",
            "tests/engine/test_engine.py",
            "tests/engine/test_stray_values.py",
            "tests/engine/test_fused_step.py",
            "tests/engine/test_batches.py",
            "tests/engine/test_unfetched.py",
            *_PITFALLS,
        )
    ),
    "lora_dp/engine/fused_step.py": Target(
        (
            "tests/engine/test_fused_step.py",
            "tests/privacy/test_noise.py",
            "tests/privacy/test_mechanism.py",
            "tests/engine/test_resume.py",
            "tests/engine/test_phases.py",
            "tests/pitfalls/test_noise.py",
        ),
        ("tests/kernels/test_private_step.py",),
    ),
    "lora_dp/engine/optimizer.py": Target(
        (
            "tests/engine/test_optimizer.py",
            "tests/engine/test_engine.py",
            "tests/engine/test_batches.py",
            "tests/engine/test_logical_batch.py",
            "tests/engine/test_training_loops.py",
            "tests/engine/test_ownership.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/privacy/test_secret_state.py",
            "tests/privacy/test_secret_cuda_state.py",
            "tests/privacy/test_seeds_in_forward.py",
            "tests/engine/test_resume.py",
            "tests/engine/test_phases.py",
            "tests/privacy/test_filtering.py",
            "tests/nn/test_regulator.py",
            "tests/engine/test_stray_values.py",
            "tests/engine/test_setup_refusals.py",
            "tests/test_argument_checks.py",
            "tests/engine/test_fixed_settings.py",
            "tests/engine/test_foreign_wrappers.py",
            "tests/isolation/loss_checks/test_loss_vectors.py",
            "tests/isolation/loss_checks/test_padded_widths.py",
            "tests/engine/test_gradients.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/nn/test_per_example.py",
            "tests/nn/test_backward_passes.py",
            "tests/engine/test_recorder.py",
            "tests/engine/test_fused_step.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/isolation/loss_checks/test_models_own_losses.py",
            "tests/isolation/loss_checks/test_divisors.py",
            "tests/isolation/loss_checks/test_backward_calls.py",
            "tests/isolation/loss_checks/test_broadcast_targets.py",
            *_PITFALLS,
        )
    ),
    "lora_dp/privacy/randomness.py": Target(
        (
            "tests/privacy/test_randomness.py",
            "tests/privacy/test_draws.py",
            "tests/privacy/test_secret_keys.py",
            "tests/privacy/test_noise.py",
            "tests/privacy/test_mechanism.py",
            "tests/engine/test_resume.py",
        )
    ),
    "lora_dp/privacy/secret_state.py": Target(_SECRET_DRAWS),
    "lora_dp/privacy/cpu_draws.py": Target(
        (
            "tests/privacy/test_cpu_draws.py",
            "tests/privacy/test_secret_state.py",
            "tests/privacy/test_secret_cuda_state.py",
            "tests/privacy/test_seeds_in_forward.py",
            "tests/privacy/test_drawing_ops.py",
            "tests/isolation/test_deterministic.py",
        )
    ),
}
