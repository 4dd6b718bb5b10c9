"""Faults of clipping and of noise, with what catches each."""

from tests.faults.fed_plants import same_noise_at_each_client
from tests.faults.planting import AUDIT, FULL, PHASE_A, Fault
from tests.faults.plants import (
    clip_the_batch,
    count_without_noise,
    filter_before_the_noise,
    half_the_noise,
    moments_before_the_noise,
    nan_passes,
    no_clipping,
    no_noise_on_accumulated_batches,
    no_noise_on_padded_batches,
    noise_before_the_sum,
    noise_for_each_micro_batch,
    noise_only_on,
    norms_in_float16,
    quantile_for_nothing,
    same_noise_after_resuming,
    same_noise_in_each_layer,
    silent_release,
    squares_in_float32,
    views_summed_after_the_clip,
    whole_bound_for_each_layer,
)

NOISED = "tests/faults/test_noise_everywhere.py::test_every_parameter_of_every_step_is_noised"
STATED = "tests/engine/test_engine.py::test_noise_has_the_stated_variance"

CLIPPING_AND_NOISE = [
    Fault(
        "no clipping",
        "one example moves the sum by as much as it likes, and the noise is made for C.",
        no_clipping,
        (
            "tests/pitfalls/test_clipping.py::test_each_example_is_clipped[flat]",
            "tests/pitfalls/test_noise.py::test_noise_matches_sensitivity[flat]",
            AUDIT,
        ),
        FULL,
    ),
    Fault(
        "the batch is clipped, not each example",
        "one example can turn the clipped sum round, by up to 2C, where the noise is made for C.",
        clip_the_batch,
        ("tests/pitfalls/test_clipping.py::test_each_example_is_clipped[flat]",),
    ),
    Fault(
        "each layer is clipped at the whole bound C",
        "one example moves the sum by √layers · C.",
        whole_bound_for_each_layer,
        (
            "tests/pitfalls/test_noise.py::test_noise_matches_sensitivity[per_layer]",
            "tests/privacy/test_clipping.py::test_per_layer",
        ),
    ),
    Fault(
        "views of an example are clipped one by one and summed",
        "an example moves the sum by as many times C as it has views.",
        views_summed_after_the_clip,
        (
            "tests/engine/test_views.py::test_an_example_moves_the_sum_by_at_most_the_bound[vector-direct]",
            "tests/engine/test_views.py::test_an_example_moves_the_sum_by_at_most_the_bound[mean-ghost]",
            "tests/engine/test_views.py::test_views_that_are_alike_are_as_one[2-flat]",
        ),
    ),
    Fault(
        "the quantile that the bound follows is not paid for",
        "a second release beside the gradient, whose noise is as if there were none.",
        quantile_for_nothing,
        (
            "tests/engine/test_moving_bound.py::test_the_gradient_pays_for_the_count[native]",
            "tests/engine/test_moving_bound.py::test_the_gradient_pays_for_the_count[torch]",
            "tests/privacy/test_adaptive_clipping.py::test_both_releases_together_have_the_accounted_noise[1.0-0.25]",
        ),
    ),
    Fault(
        "the count that moves the bound is not noised",
        "the bound tells how many of the drawn examples lie within it.",
        count_without_noise,
        (
            "tests/engine/test_moving_bound.py::test_the_count_is_noised",
            "tests/privacy/test_adaptive_clipping.py::test_the_released_count_has_the_stated_noise[0.0-1.0-0.01]",
        ),
    ),
    Fault(
        "an example of NaN passes",
        "it makes the whole release NaN, which tells that it was there.",
        nan_passes,
        (
            "tests/pitfalls/test_clipping.py::test_non_finite_examples_contribute_zero[direct-flat-nullcontext]",
            "tests/pitfalls/test_clipping.py::test_non_finite_examples_contribute_zero[ghost-flat-reference_only]",
        ),
    ),
    Fault(
        "norms overflow in float16",
        "a gradient with a larger norm than 256 is clipped as if it were 256.",
        norms_in_float16,
        ("tests/pitfalls/test_clipping.py::test_large_half_gradients_are_clipped_right[float16-direct]",),
    ),
    Fault(
        "norms whose squares vanish in float32",
        "at a bound of 1e-20 an example of tiny numbers has a norm of 0, and is summed as it is.",
        squares_in_float32,
        (
            "tests/nn/test_norms.py::test_the_least_bound_where_squares_vanish_in_float32[1-flat]",
            "tests/nn/test_norms.py::test_the_least_bound_where_squares_vanish_in_float32[64-per_layer]",
        ),
    ),
    Fault(
        "noise at half its deviation",
        "the ledger claims twice the noise that there is.",
        half_the_noise,
        ("tests/pitfalls/test_accounting.py::test_ledger_describes_the_run", f"{STATED}[B-seeded]", AUDIT),
        FULL,
    ),
    Fault(
        "noise before the sum",
        "the noise grows with the number of examples drawn, which is private, and an empty batch has none.",
        noise_before_the_sum,
        ("tests/pitfalls/test_batches.py::test_noise_and_divisor_ignore_the_data[flat]", f"{STATED}[AB-seeded]"),
    ),
    Fault(
        "no noise on the head",
        "the head's gradient is released as it is.",
        lambda planting: noise_only_on(planting, lambda p, trained: p.factor is not None),
        (f"{STATED}[B-seeded]", f"{NOISED}[torch-drawn-AB]", AUDIT),
        FULL,
    ),
    Fault(
        "no noise on the factor A",
        "its gradient is released as it is.",
        lambda planting: noise_only_on(planting, lambda p, trained: p.factor != "A"),
        (f"{STATED}[AB-seeded]", f"{NOISED}[torch-drawn-AB]", AUDIT),
        FULL,
    ),
    Fault(
        "no noise in the phase that trains A",
        "every second step of an alternating run releases its gradients as they are.",
        lambda planting: noise_only_on(planting, lambda p, trained: any(q.factor == "B" for q in trained)),
        (f"{NOISED}[native-drawn-BA]", f"{NOISED}[torch-drawn-BA]", AUDIT),
        PHASE_A,
    ),
    Fault(
        "no noise on a padded batch",
        "the clipped sum of its examples is released as it is.",
        no_noise_on_padded_batches,
        (
            f"{NOISED}[native-padded-AB]",
            f"{NOISED}[torch-padded-AB]",
            "tests/engine/test_cuda_graphs.py::test_same_steps_as_without[auto-AB-cpu]",
        ),
    ),
    Fault(
        "no noise on an empty batch",
        "a release of exactly zero tells that nobody was drawn.",
        lambda planting: silent_release(planting, lambda optimizer: optimizer.batch.examples == 0),
        (f"{STATED}[AB-seeded]", f"{NOISED}[torch-empty-AB]"),
    ),
    Fault(
        "the same noise after resuming",
        "two releases differ by their sums alone: the difference has no noise.",
        same_noise_after_resuming,
        (
            "tests/privacy/test_randomness.py::test_a_seeded_source_resumes_where_it_was_saved",
            "tests/engine/test_resume.py::test_resumed_run_goes_on_bit_for_bit[3]",
            "tests/privacy/test_draws.py::test_training_takes_no_block_twice[seeded-AdamW]",
        ),
    ),
    Fault(
        "the same noise in each layer",
        "the difference of two layers' releases has no noise.",
        same_noise_in_each_layer,
        (
            "tests/privacy/test_draws.py::test_training_takes_no_block_twice[seeded-AdamW]",
            "tests/privacy/test_draws.py::test_training_takes_no_block_twice[secure-Adagrad]",
            "tests/privacy/test_mechanism.py::test_every_tensor_of_a_release_gets_noise_of_its_own",
        ),
    ),
    Fault(
        "the same noise at each client",
        "the difference of two clients' updates has no noise.",
        same_noise_at_each_client,
        ("tests/fed/test_launch.py::test_clients_and_rounds_of_a_reproducible_run_draw_different_noise",),
    ),
    Fault(
        "noise for each micro-batch of a logical batch",
        "its noise depends on how the batch was cut, and is not what the ledger describes.",
        noise_for_each_micro_batch,
        ("tests/pitfalls/test_noise.py::test_one_noise_draw_for_a_logical_batch",),
    ),
    Fault(
        "no noise on accumulated micro-batches",
        "the clipped sum of the logical batch is released as it is.",
        no_noise_on_accumulated_batches,
        ("tests/pitfalls/test_noise.py::test_one_noise_draw_for_a_logical_batch",),
    ),
    Fault(
        "the filter before the noise, its strength read off the data",
        "what is private chooses the sensitivity, which the noise is not made for.",
        filter_before_the_noise,
        ("tests/engine/test_engine.py::test_filters_come_after_the_noise_and_touch_factors_only[low_pass0]",),
    ),
    Fault(
        "second moments of gradients before their noise",
        "a client sends its moments, and these tell what the gradients were.",
        moments_before_the_noise,
        (
            "tests/fed/methods/test_dp_fedadamw.py::"
            "test_what_a_client_says_of_its_moments_comes_from_its_noised_gradients",
        ),
    ),
]
