"""What is mutated, and which tests are to notice: those of the module first, quick ones before slow ones."""

from dataclasses import dataclass

_PITFALLS = (
    "tests/pitfalls/test_noise.py",
    "tests/pitfalls/test_clipping.py",
    "tests/pitfalls/test_batches.py",
    "tests/pitfalls/test_accounting.py",
    "tests/pitfalls/test_coverage.py",
)
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
    "tests/ops/test_native.py",
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
_TRIALS = (
    "tests/isolation/test_batch_trials.py",
    "tests/isolation/test_single_examples.py",
    "tests/isolation/test_each_trial.py",
    "tests/isolation/test_criterion.py",
    "tests/isolation/test_trials.py",
    "tests/isolation/test_edges.py",
    "tests/isolation/test_check.py",
    "tests/pitfalls/test_coverage.py",
    "tests/lora/test_carried_embeddings.py",
)
_LOSSES = (
    "tests/isolation/loss_checks/test_paired_losses.py",
    "tests/isolation/loss_checks/test_watch.py",
    "tests/isolation/loss_checks/test_models_own_losses.py",
    "tests/isolation/loss_checks/test_divisors.py",
    "tests/isolation/loss_checks/test_ways_to_backward.py",
    "tests/isolation/loss_checks/test_broadcast_targets.py",
    "tests/isolation/loss_checks/test_loss_vectors.py",
    "tests/isolation/loss_checks/test_padded_widths.py",
    "tests/nn/test_kept_graph.py",
    "tests/isolation/test_check.py",
    "tests/isolation/test_batch_trials.py",
    "tests/isolation/test_single_examples.py",
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
    "tests/fed/flower/test_chained_ledgers.py",
    "tests/test_hash_chain.py",
    "tests/fed/flower/test_ledger.py",
    "tests/fed/flower/test_keys.py",
)
_UNITS = (
    "tests/fed/rounds/test_units.py",
    "tests/fed/rounds/test_secret_draws.py",
    "tests/fed/rounds/test_as_released.py",
    "tests/fed/methods/test_aggregation.py",
    "tests/fed/methods/test_products.py",
    "tests/fed/methods/test_methods.py",
    "tests/fed/rounds/test_update_checks.py",
    "tests/fed/rounds/test_local_engine.py",
    "tests/fed/rounds/test_secrets.py",
)


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
    "lora_dp/isolation/collation/trial.py": Target(
        (
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
            "tests/isolation/collation/test_own_generators.py",
            "tests/engine/test_batches.py",
            "tests/pitfalls/test_batches.py",
        )
    ),
    "lora_dp/isolation/collation/rows.py": Target(
        (
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
        )
    ),
    "lora_dp/isolation/collation/beside.py": Target(
        (
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
        )
    ),
    "lora_dp/isolation/collation/names.py": Target(("tests/isolation/collation/test_names.py",)),
    "lora_dp/isolation/collation/leaves.py": Target(
        (
            "tests/isolation/collation/test_leaves.py",
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
        )
    ),
    "lora_dp/isolation/collation/few_examples.py": Target(
        (
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
            "tests/isolation/collation/test_names.py",
        )
    ),
    "lora_dp/isolation/collation/row_equality.py": Target(
        (
            "tests/isolation/collation/test_row_equality.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/engine/test_skipped_batches.py",
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
        )
    ),
    "lora_dp/isolation/collation/own_generators.py": Target(("tests/isolation/collation/test_own_generators.py",)),
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
    "lora_dp/privacy/accounting/history.py": Target(
        ("tests/privacy/accounting/test_history.py", "tests/engine/test_resume.py")
    ),
    "lora_dp/privacy/accounting/planning.py": Target(
        (
            "tests/privacy/accounting/test_planning.py",
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
    "lora_dp/isolation/check.py": Target(
        (
            "tests/isolation/test_choices.py",
            "tests/isolation/test_each_trial.py",
            "tests/isolation/test_criterion.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/test_edges.py",
            "tests/isolation/test_check.py",
            "tests/isolation/test_other_batches.py",
            "tests/isolation/test_widths.py",
            "tests/isolation/test_tried_again.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
            "tests/engine/test_validation.py",
            "tests/pitfalls/test_coverage.py",
            "tests/isolation/batches/test_lists.py",
            "tests/isolation/model_state/test_buffers.py",
            "tests/isolation/test_own_losses.py",
            "tests/isolation/batches/test_objects.py",
            "tests/isolation/test_larger_batches.py",
        )
    ),
    "lora_dp/isolation/other_batches.py": Target(
        (
            "tests/isolation/test_other_batches.py",
            "tests/isolation/test_widths.py",
            "tests/isolation/test_tried_again.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            "tests/isolation/test_each_trial.py",
            "tests/isolation/test_criterion.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/test_edges.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
            "tests/isolation/model_state/test_buffers.py",
            "tests/isolation/test_own_losses.py",
            "tests/isolation/test_larger_batches.py",
            "tests/isolation/batches/test_shared_arguments.py",
        )
    ),
    "lora_dp/isolation/trial_values.py": Target(
        (
            "tests/isolation/test_trial_values.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/test_other_batches.py",
            "tests/isolation/test_widths.py",
            "tests/isolation/test_tried_again.py",
            "tests/isolation/test_trials.py",
            "tests/isolation/test_each_trial.py",
            "tests/isolation/test_criterion.py",
            "tests/isolation/test_trials.py",
        )
    ),
    "lora_dp/isolation/seeding.py": Target(
        (
            "tests/isolation/test_seeding.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
            "tests/isolation/collation/test_own_generators.py",
            "tests/isolation/test_each_trial.py",
            "tests/isolation/test_criterion.py",
            "tests/isolation/test_trials.py",
        )
    ),
    "lora_dp/isolation/model_state/buffers.py": Target(("tests/isolation/model_state/test_buffers.py",)),
    "lora_dp/isolation/model_state/parts.py": Target(
        (
            "tests/isolation/model_state/test_parts.py",
            "tests/isolation/model_state/test_parameters.py",
            "tests/engine/test_beside.py",
        )
    ),
    "lora_dp/isolation/batches/lists.py": Target(
        (
            "tests/isolation/batches/test_lists.py",
            "tests/isolation/batches/test_objects.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
        )
    ),
    "lora_dp/isolation/batches/objects.py": Target(
        (
            "tests/isolation/batches/test_objects.py",
            "tests/isolation/batches/test_object_graphs.py",
            "tests/isolation/batches/test_object_settings.py",
            "tests/isolation/collation/test_rows.py",
            "tests/isolation/collation/test_flattened_rows.py",
        )
    ),
    "lora_dp/engine/repeated_examples.py": Target(("tests/engine/test_repeated_examples.py",)),
    "lora_dp/fed/data/split_files.py": Target(
        (
            "tests/fed/data/test_split_files.py",
            "tests/fed/data/test_datasets.py",
            "tests/fed/data/test_opening.py",
            "tests/fed/data/test_encoding.py",
            "tests/fed/data/test_options.py",
        )
    ),
    "lora_dp/isolation/model_state/parameters.py": Target(
        (
            "tests/isolation/model_state/test_parameters.py",
            "tests/engine/test_beside.py",
            "tests/isolation/model_state/test_buffers.py",
        )
    ),
    "lora_dp/isolation/loss_checks/gradients.py": Target(
        (
            "tests/isolation/loss_checks/test_gradients.py",
            "tests/isolation/loss_checks/test_loss_vectors.py",
            "tests/isolation/loss_checks/test_padded_widths.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/isolation/loss_checks/test_models_own_losses.py",
            "tests/isolation/loss_checks/test_divisors.py",
            "tests/isolation/loss_checks/test_ways_to_backward.py",
            "tests/isolation/loss_checks/test_broadcast_targets.py",
        )
    ),
    "lora_dp/isolation/trials.py": Target(
        (
            *_TRIALS,
            "tests/isolation/test_trials.py",
            "tests/isolation/test_other_batches.py",
            "tests/isolation/test_widths.py",
            "tests/isolation/test_tried_again.py",
            "tests/isolation/model_state/test_parts.py",
            "tests/isolation/test_own_losses.py",
        )
    ),
    "lora_dp/isolation/batches/calls.py": Target(
        (
            "tests/isolation/batches/test_calls.py",
            "tests/isolation/batches/test_kinds.py",
            "tests/isolation/batches/test_padding.py",
            "tests/isolation/test_order.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            *_TRIALS,
        )
    ),
    "lora_dp/isolation/batches/kinds.py": Target(
        (
            "tests/isolation/batches/test_kinds.py",
            "tests/isolation/batches/test_calls.py",
            "tests/isolation/batches/test_padding.py",
            "tests/isolation/test_order.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            *_TRIALS,
        )
    ),
    "lora_dp/isolation/batches/padding.py": Target(
        (
            "tests/isolation/batches/test_padding.py",
            "tests/isolation/batches/test_calls.py",
            "tests/isolation/batches/test_kinds.py",
            "tests/isolation/test_order.py",
            "tests/isolation/test_choices.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            *_TRIALS,
        )
    ),
    "lora_dp/isolation/batches/sizes.py": Target(
        (
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_untaken_trials.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
        )
    ),
    "lora_dp/isolation/batches/shared_arguments.py": Target(
        (
            "tests/isolation/batches/test_shared_arguments.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
        )
    ),
    "lora_dp/isolation/batches/tables.py": Target(
        (
            "tests/isolation/batches/test_tables.py",
            "tests/isolation/batches/test_sizes.py",
            "tests/isolation/batches/test_untaken_trials.py",
            "tests/isolation/batches/test_calls.py",
            "tests/isolation/batches/test_kinds.py",
            "tests/isolation/batches/test_padding.py",
        )
    ),
    "lora_dp/isolation/deterministic.py": Target(
        (
            "tests/isolation/test_deterministic.py",
            "tests/privacy/test_drawing_ops.py",
            "tests/isolation/test_batch_trials.py",
            "tests/isolation/test_single_examples.py",
        )
    ),
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
    "lora_dp/isolation/loss_checks/graph.py": Target(
        (
            "tests/isolation/loss_checks/test_graph.py",
            "tests/isolation/loss_checks/test_vector_constants.py",
            "tests/isolation/loss_checks/test_gradients.py",
            "tests/engine/test_beside.py",
            "tests/isolation/test_own_losses.py",
            *_LOSSES,
        )
    ),
    "lora_dp/isolation/loss_checks/own_scales.py": Target(
        (
            "tests/isolation/loss_checks/test_own_scales.py",
            "tests/isolation/loss_checks/test_discounts.py",
            "tests/isolation/loss_checks/test_numbers_outside.py",
            "tests/isolation/test_own_losses.py",
            "tests/isolation/loss_checks/test_graph.py",
            "tests/isolation/loss_checks/test_vector_constants.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/isolation/loss_checks/test_models_own_losses.py",
            "tests/isolation/loss_checks/test_divisors.py",
            "tests/isolation/loss_checks/test_ways_to_backward.py",
            "tests/isolation/loss_checks/test_broadcast_targets.py",
        )
    ),
    "lora_dp/isolation/loss_checks/watch.py": Target(
        (
            "tests/engine/test_beside.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/isolation/loss_checks/test_models_own_losses.py",
            "tests/isolation/loss_checks/test_divisors.py",
            "tests/isolation/loss_checks/test_ways_to_backward.py",
            "tests/isolation/loss_checks/test_broadcast_targets.py",
            "tests/isolation/model_state/test_parameters.py",
            *_LOSSES[1:],
            "tests/nn/test_reentrant.py",
            "tests/engine/test_compile.py",
            "tests/isolation/loss_checks/test_paired_losses.py",
            "tests/isolation/test_own_losses.py",
            "tests/isolation/loss_checks/test_own_scales.py",
            "tests/isolation/loss_checks/test_discounts.py",
            "tests/isolation/loss_checks/test_numbers_outside.py",
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
            "tests/engine/test_drawn_batches.py",
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
            "tests/engine/test_drawn_batches.py",
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
            "tests/engine/test_drawn_batches.py",
        )
    ),
    "lora_dp/engine/drawn_batches.py": Target(
        (
            "tests/engine/test_drawn_batches.py",
            "tests/engine/test_batches.py",
            "tests/isolation/collation/test_trial.py",
            "tests/isolation/collation/test_few_examples.py",
            "tests/isolation/collation/test_beside.py",
            "tests/isolation/collation/test_row_equality.py",
            "tests/engine/test_skipped_batches.py",
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
            "tests/engine/test_drawn_batches.py",
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
            "tests/isolation/loss_checks/test_ways_to_backward.py",
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
    "lora_dp/fed/rounds/ledgers.py": Target(
        (
            "tests/fed/rounds/test_ahead_log.py",
            "tests/fed/test_origin.py",
            "tests/fed/rounds/test_setup.py",
            "tests/fed/rounds/test_ledgers.py",
            "tests/fed/rounds/test_release_log.py",
            "tests/fed/test_launch.py",
            "tests/fed/runs/test_results.py",
            "tests/fed/runs/test_loop.py",
            "tests/fed/rounds/test_server.py",
            "tests/fed/test_config.py",
            "tests/fed/runs/test_resume.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
        )
    ),
    "lora_dp/fed/origin.py": Target(
        (
            "tests/fed/test_origin.py",
            "tests/fed/rounds/test_setup.py",
            "tests/fed/flower/test_ledger.py",
            "tests/fed/flower/test_keys.py",
        )
    ),
    "lora_dp/fed/rounds/client.py": Target(
        (
            "tests/fed/rounds/test_client.py",
            "tests/fed/rounds/test_local_training.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            "tests/fed/rounds/test_secrets.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
            "tests/fed/rounds/test_centralised.py",
        )
    ),
    "lora_dp/fed/rounds/local_training.py": Target(
        (
            "tests/fed/rounds/test_local_training.py",
            "tests/fed/rounds/test_client.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            "tests/fed/rounds/test_secrets.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
            "tests/fed/rounds/test_centralised.py",
        )
    ),
    "lora_dp/fed/rounds/seeds.py": Target(
        (
            "tests/fed/rounds/test_client.py",
            "tests/fed/rounds/test_local_training.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            "tests/fed/rounds/test_secrets.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
            "tests/fed/rounds/test_centralised.py",
        )
    ),
    "lora_dp/fed/rounds/server_noise.py": Target(
        (
            "tests/fed/rounds/test_server_noise.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
        )
    ),
    "lora_dp/fed/rounds/contained_failures.py": Target(
        (
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            "tests/fed/rounds/test_fixed_shapes.py",
            "tests/fed/rounds/test_text_shapes.py",
            "tests/fed/rounds/test_units.py",
            "tests/fed/rounds/test_secret_draws.py",
            "tests/fed/rounds/test_as_released.py",
            "tests/fed/rounds/test_secrets.py",
        )
    ),
    "lora_dp/fed/rounds/fixed_shapes.py": Target(
        ("tests/fed/rounds/test_fixed_shapes.py", "tests/fed/rounds/test_text_shapes.py")
    ),
    "lora_dp/fed/data/unreadable.py": Target(
        (
            "tests/fed/data/test_unreadable.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            "tests/fed/data/test_examples.py",
            "tests/fed/rounds/test_secrets.py",
            "tests/fed/data/test_datasets.py",
            "tests/fed/data/test_opening.py",
            "tests/fed/data/test_encoding.py",
            "tests/fed/data/test_options.py",
            "tests/fed/data/test_own_data.py",
            "tests/fed/data/test_own_images.py",
            "tests/fed/data/test_own_classes.py",
            "tests/fed/data/test_own_rows.py",
        )
    ),
    "lora_dp/fed/data/own_data.py": Target(
        (
            "tests/fed/data/test_own_data.py",
            "tests/fed/data/test_own_images.py",
            "tests/fed/data/test_own_classes.py",
            "tests/fed/data/test_own_rows.py",
            "tests/fed/data/test_split_files.py",
            "tests/fed/flower/test_own_examples.py",
        )
    ),
    "lora_dp/fed/data/own_rows.py": Target(
        (
            "tests/fed/data/test_own_rows.py",
            "tests/fed/data/test_own_data.py",
            "tests/fed/data/test_own_images.py",
            "tests/fed/data/test_own_classes.py",
        )
    ),
    "lora_dp/fed/safe_text.py": Target(
        (
            "tests/fed/test_safe_text.py",
            "tests/fed/flower/test_hostile_client.py",
            "tests/fed/flower/test_hostile_server.py",
            "tests/fed/flower/test_repeated_rounds.py",
            "tests/fed/flower/test_owner_policies.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
        )
    ),
    "lora_dp/fed/rounds/privacy_plan.py": Target(
        (
            "tests/fed/rounds/test_privacy_plan.py",
            "tests/fed/rounds/test_ledgers.py",
            "tests/fed/rounds/test_release_log.py",
            *_UNITS,
        )
    ),
    "lora_dp/fed/rounds/federation.py": Target(
        (
            "tests/fed/rounds/test_federation.py",
            "tests/fed/rounds/test_failed_rounds.py",
            "tests/fed/rounds/test_client.py",
            "tests/fed/rounds/test_local_training.py",
            "tests/fed/rounds/test_contained_failures.py",
            "tests/fed/rounds/test_failing_clients.py",
            *_UNITS,
            "tests/fed/rounds/test_ledgers.py",
            "tests/fed/rounds/test_release_log.py",
            "tests/fed/runs/test_checkpoint.py",
            "tests/fed/runs/test_folder.py",
        )
    ),
    "lora_dp/fed/flower/ledger.py": Target(
        (
            "tests/fed/flower/test_own_paths.py",
            "tests/fed/flower/test_ledger.py",
            "tests/fed/flower/test_keys.py",
            "tests/fed/flower/test_chained_ledgers.py",
            "tests/test_hash_chain.py",
        )
    ),
    "lora_dp/fed/flower/policy.py": Target(
        (
            "tests/fed/flower/test_policy.py",
            "tests/fed/flower/test_hostile_server.py",
            "tests/fed/flower/test_repeated_rounds.py",
            "tests/fed/flower/test_owner_policies.py",
            "tests/fed/flower/test_ledger.py",
            "tests/fed/flower/test_keys.py",
            "tests/fed/flower/test_server.py",
            "tests/fed/flower/test_messages.py",
            "tests/fed/flower/test_client.py",
            "tests/fed/flower/test_without_telemetry.py",
        )
    ),
    "lora_dp/fed/flower/tensors.py": Target(
        (
            "tests/fed/flower/test_tensors.py",
            "tests/fed/flower/test_hostile_client.py",
            "tests/fed/flower/test_message_bytes.py",
        )
    ),
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
            "tests/ops/test_native.py",
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
    "lora_dp/privacy/mechanism.py",
    "lora_dp/privacy/clipping.py",
    "lora_dp/fed/rounds/server_noise.py",
    "lora_dp/engine/fused_step.py",
    "lora_dp/losses.py",
    "lora_dp/privacy/randomness.py",
    "lora_dp/privacy/accounting/steps.py",
    "lora_dp/privacy/accounting/ledger.py",
    "lora_dp/privacy/accounting/history.py",
    "lora_dp/privacy/accounting/epsilon.py",
    "lora_dp/privacy/accounting/planning.py",
    "lora_dp/isolation/seeding.py",
    "lora_dp/isolation/collation/own_generators.py",
    "lora_dp/isolation/loss_checks/gradients.py",
    "lora_dp/fed/origin.py",
    "lora_dp/fed/data/own_rows.py",
    "lora_dp/fed/data/own_data.py",
    "lora_dp/fed/rounds/privacy_plan.py",
    "lora_dp/fed/rounds/fixed_shapes.py",
    "lora_dp/privacy/secret_state.py",
    "lora_dp/fed/flower/tensors.py",
    "lora_dp/privacy/cpu_draws.py",
    "lora_dp/isolation/model_state/parameters.py",
    "lora_dp/privacy/noise.py",
    "lora_dp/privacy/sampling.py",
    "lora_dp/engine/data_loader.py",
    "lora_dp/isolation/batches/sizes.py",
    "lora_dp/isolation/batches/tables.py",
    "lora_dp/nn/per_example.py",
    "lora_dp/engine/recorder.py",
    "lora_dp/hash_chain.py",
    "lora_dp/lora/bypassed_layers.py",
    "lora_dp/fed/safe_text.py",
    "lora_dp/fed/data/unreadable.py",
    "lora_dp/fed/rounds/contained_failures.py",
    "lora_dp/fed/rounds/federation.py",
    "lora_dp/fed/flower/policy.py",
    "lora_dp/fed/rounds/client.py",
    "lora_dp/fed/rounds/local_training.py",
    "lora_dp/fed/rounds/seeds.py",
    "lora_dp/engine/validation.py",
    "lora_dp/isolation/model_state/buffers.py",
    "lora_dp/isolation/model_state/parts.py",
    "lora_dp/isolation/batches/lists.py",
    "lora_dp/engine/repeated_examples.py",
    "lora_dp/fed/rounds/ledgers.py",
    "lora_dp/fed/flower/ledger.py",
    "lora_dp/isolation/trials.py",
    "lora_dp/isolation/other_batches.py",
    "lora_dp/isolation/trial_values.py",
    "lora_dp/isolation/batches/calls.py",
    "lora_dp/isolation/batches/kinds.py",
    "lora_dp/isolation/batches/padding.py",
    "lora_dp/isolation/check.py",
    "lora_dp/isolation/batches/shared_arguments.py",
    "lora_dp/engine/drawn_batches.py",
    "lora_dp/engine/hooks.py",
)
