"""The proofs of isolation: which tests are to notice a mutant of each file."""

from tests.mutation.target import Target

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
    "tests/isolation/loss_checks/test_backward_calls.py",
    "tests/isolation/loss_checks/test_broadcast_targets.py",
    "tests/isolation/loss_checks/test_loss_vectors.py",
    "tests/isolation/loss_checks/test_padded_widths.py",
    "tests/nn/test_kept_graph.py",
    "tests/isolation/test_check.py",
    "tests/isolation/test_batch_trials.py",
    "tests/isolation/test_single_examples.py",
)

ISOLATION: dict[str, Target] = {
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
            "tests/isolation/loss_checks/test_backward_calls.py",
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
            "tests/isolation/loss_checks/test_backward_calls.py",
            "tests/isolation/loss_checks/test_broadcast_targets.py",
        )
    ),
    "lora_dp/isolation/loss_checks/backward_calls.py": Target(
        (
            "tests/isolation/loss_checks/test_backward_calls.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/nn/test_reentrant.py",
            "tests/engine/test_compile.py",
        )
    ),
    "lora_dp/isolation/loss_checks/watch.py": Target(
        (
            "tests/engine/test_beside.py",
            "tests/isolation/loss_checks/test_watch.py",
            "tests/isolation/loss_checks/test_models_own_losses.py",
            "tests/isolation/loss_checks/test_divisors.py",
            "tests/isolation/loss_checks/test_backward_calls.py",
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
}
