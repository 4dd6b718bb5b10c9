"""The list of the faults, with what catches each."""

from tests.faults.fed_plants import (
    damaged_ledgers_begun_anew,
    dealt_to_two_clients,
    no_noise_by_the_client,
    nodes_without_a_ledger_obey,
    opened_by_two_clients,
    rounds_logged_late,
    same_noise_at_each_client,
    server_divides_by_replies,
    server_noise_on_empty_rounds_only,
)
from tests.faults.mixing_plants import (
    any_reduction_taken,
    backwards_not_tried,
    buffers_of_rare_batches_taken,
    canaries_may_miss_steps,
    changing_divisors_taken,
    collation_never_tried,
    damaged_lines_read,
    failing_batches_left_out,
    first_batch_alone_tried,
    frozen_parameters_thawed,
    generators_left_as_a_pass_left_them,
    hidden_tensors_trained,
    larger_batches_taken,
    lists_stay_as_they_are,
    lookups_measured_in_float32,
    losses_at_padding_taken,
    losses_of_later_batches_taken,
    losses_that_meet_taken,
    losses_that_no_graph_shows_taken,
    masks_of_a_short_seed,
    ops_of_parts_not_compared,
    own_losses_trusted,
    padding_never_tried,
    pairs_with_all_others_taken,
    parameters_beside_the_model_trained,
    parameters_written_to,
    refusals_forgotten,
    rounded_to_the_sums_dtype,
    same_number_of_examples_alone_tried,
    seeds_taken,
    servers_obeyed,
    settings_not_looked_at,
    single_examples_not_tried,
    skipped_batches_forgotten,
    splits_told_by_any_word,
    unfetched_batches_forgotten,
    unseen_losses_taken,
    what_all_share_taken,
    whole_batches_not_tried,
)
from tests.faults.planting import AUDIT, ISOLATION, REFUSED, Fault
from tests.faults.plants import (
    batch_mean_in_a_module,
    clip_the_batch,
    divide_by_the_batch,
    everybody_in_every_batch,
    filter_before_the_noise,
    frozen_parameters_stepped,
    half_the_noise,
    ledger_behind,
    nan_passes,
    no_clipping,
    no_noise_on_accumulated_batches,
    no_noise_on_padded_batches,
    noise_before_the_sum,
    noise_for_each_micro_batch,
    noise_only_on,
    norms_in_float16,
    plain_head_left_trainable,
    same_noise_after_resuming,
    same_noise_in_each_layer,
    samplers_passed_over,
    shuffled_batches,
    silent_release,
    squares_in_float32,
    step_of_swin,
    step_on_windows,
    train_a_step,
    twice_in_a_batch,
    uncovered_parameter,
    whole_bound_for_each_layer,
    windows_counted,
    windows_of_all_examples_first,
)

# One step on everybody, and eight at a rate of 1/8.
FULL = {"noise_multiplier": 1.0, "steps": 1}
SAMPLED = {"noise_multiplier": 0.8, "batch_size": 8, "steps": 8}
PHASE_A = {**FULL, "phases": "A"}

NOISED = "tests/faults/test_noise_everywhere.py::test_every_parameter_of_every_step_is_noised"
STATED = "tests/engine/test_engine.py::test_noise_has_the_stated_variance"

FAULTS = [
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
        lambda planting: silent_release(planting, lambda optimizer: optimizer._examples == 0),
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
        "division by the actual batch size",
        "the scale of noise and update tells how many were drawn, and one example changes everybody's weight.",
        divide_by_the_batch,
        ("tests/pitfalls/test_batches.py::test_divisor_is_the_expected_batch",),
    ),
    Fault(
        "shuffled batches, accounted as Poisson's",
        "who was not in the batches before is in the next for sure: the claimed amplification does not hold.",
        shuffled_batches,
        ("tests/pitfalls/test_batches.py::test_batches_are_poisson",),
    ),
    Fault(
        "everybody in every batch, accounted as sampled",
        "there is no amplification by sampling at all.",
        everybody_in_every_batch,
        ("tests/engine/test_data_loader.py::test_every_draw_is_a_batch_or_an_empty_step_in_its_place[0]", AUDIT),
        SAMPLED,
    ),
    Fault(
        "an example twice in a batch",
        "it moves the sum by 2C.",
        twice_in_a_batch,
        ("tests/privacy/test_sampling.py::test_every_example_has_the_same_rate[SecureSource]",),
    ),
    Fault(
        "a sampler over other data is passed over",
        "examples that its owner kept out are trained on, at a rate that is not theirs.",
        samplers_passed_over,
        (
            "tests/test_argument_checks.py::test_an_order_over_other_examples_is_refused[SequentialSampler0]",
            "tests/test_argument_checks.py::test_an_order_over_other_examples_is_refused[RandomSampler3]",
        ),
    ),
    Fault(
        "an example is dealt to two clients",
        "what it spends is in two ledgers, and neither holds it all.",
        dealt_to_two_clients,
        ("tests/faults/test_clients_data.py::test_clients_train_on_disjoint_examples[dirichlet]",),
    ),
    Fault(
        "a client opens an example of another's",
        "as above, though the partition is right.",
        opened_by_two_clients,
        (
            "tests/faults/test_clients_data.py::test_clients_train_on_disjoint_examples[iid]",
            "tests/faults/test_clients_data.py::test_clients_train_on_disjoint_examples[dirichlet]",
        ),
    ),
    Fault(
        "windows counted as examples",
        "each window is clipped to C by itself: an example moves the sum by as many times C as it has windows.",
        windows_counted,
        (REFUSED,),
        run=step_on_windows,
        refusal="joins 4 numbers in a batch of 8 examples",
    ),
    Fault(
        "windows in another order than their examples",
        "each example is clipped by the norms of others' windows.",
        windows_of_all_examples_first,
        (ISOLATION,),
        run=step_of_swin,
        refusal="attributed to",
    ),
    Fault(
        "an uncovered parameter is trained",
        "its gradient is neither clipped nor noised.",
        uncovered_parameter,
        (
            "tests/pitfalls/test_coverage.py::test_uncovered_parameter_is_refused_by_name",
            "tests/pitfalls/test_coverage.py::test_parameter_added_later_is_refused",
        ),
    ),
    Fault(
        "a parameter that is frozen later moves by the noise",
        "what is declared still is changed and released, and shares the bound with what is trained.",
        frozen_parameters_stepped,
        (
            "tests/engine/test_frozen_later.py::test_it_neither_moves_nor_keeps_its_momentum[AdamW]",
            "tests/engine/test_frozen_later.py::test_the_rest_is_clipped_and_noised_to_the_same_bound[before step-flat]",
        ),
    ),
    Fault(
        "a trainable parameter outside the private layers",
        "as above, in the user's model.",
        plain_head_left_trainable,
        (REFUSED,),
        run=train_a_step,
        refusal="'3.weight' is trainable but no private layer covers it",
    ),
    Fault(
        "a module mixes the examples of a batch",
        "one example changes the gradients of all, which no clipping of each bounds.",
        batch_mean_in_a_module,
        (ISOLATION,),
        run=train_a_step,
        refusal="rows of '0' that are attributed to other examples",
    ),
    Fault(
        "the ledger is behind by one step",
        "after a crash the last release is forgotten.",
        ledger_behind,
        (
            "tests/pitfalls/test_accounting.py::test_ledger_is_never_behind",
            "tests/engine/test_engine.py::test_planned_run_ends_within_its_target[rdp-1.0-length0]",
        ),
    ),
    Fault(
        "a client's whole update leaves without its noise",
        "with the client as unit, its clipped change is released as it is.",
        no_noise_by_the_client,
        ("tests/fed/rounds/test_units.py::test_a_client_s_update_is_noised_as_a_whole[la-lora]",),
    ),
    Fault(
        "the server's noise on empty rounds alone",
        "the mean of the clipped changes is released as it is.",
        server_noise_on_empty_rounds_only,
        (
            "tests/fed/rounds/test_update_checks.py::test_a_client_left_out_changes_neither_the_servers_noise_nor_the_divisor[NaN]",
        ),
    ),
    Fault(
        "the server divides by the number of replies",
        "how many clients were drawn is private: one more or less changes the weight of all.",
        server_divides_by_replies,
        ("tests/fed/rounds/test_units.py::test_the_server_clips_each_client_s_whole_change[la-lora]",),
    ),
    Fault(
        "the log of rounds is behind by one",
        "after a crash, what its last round released is forgotten.",
        rounds_logged_late,
        (
            "tests/fed/runs/test_loop.py::test_the_log_on_disk_counts_a_round_before_it_begins",
            "tests/fed/rounds/test_release_log.py::test_a_round_that_ends_in_the_middle_counts",
        ),
    ),
    Fault(
        "a loss is taken for the mean that it was declared",
        "a sum moves the released sum by as many times C as there are examples.",
        any_reduction_taken,
        (
            "tests/isolation/loss_checks/test_watch.py::test_losses_that_join_examples_are_refused[declared a mean-mean-<lambda>0]",
            "tests/isolation/loss_checks/test_watch.py::test_losses_that_join_examples_are_refused[declared a sum-sum-cross_entropy]",
        ),
    ),
    Fault(
        "a divisor that counts the batch is taken",
        "one example changes the gradients of all, which no clipping of each bounds.",
        changing_divisors_taken,
        (
            "tests/isolation/loss_checks/test_divisors.py::test_a_divisor_that_follows_the_batch_is_refused_in_the_next_one",
            "tests/isolation/loss_checks/test_divisors.py::test_a_mean_over_tokens_of_a_batch_of_another_width_is_refused",
        ),
    ),
    Fault(
        "a loss in which examples meet is taken",
        "as above.",
        losses_that_meet_taken,
        (
            "tests/isolation/loss_checks/test_watch.py::test_losses_that_join_examples_are_refused"
            "[depends on the model's outputs for others-mean-contrastive]",
        ),
    ),
    Fault(
        "a loss in which examples meet in later batches is taken",
        "as above.",
        losses_of_later_batches_taken,
        (
            "tests/isolation/loss_checks/test_loss_vectors.py::test_examples_that_meet_in_a_later_batch_only_are_refused",
        ),
    ),
    Fault(
        "a loss that looks at padding is taken",
        "the longest example of a batch moves all others.",
        losses_at_padding_taken,
        (
            "tests/isolation/loss_checks/test_padded_widths.py::test_losses_that_look_at_the_padded_width_are_refused_once_it_varies"
            "[softmax over the width]",
        ),
    ),
    Fault(
        "a loss that no graph shows is taken",
        "it may divide by what the batch holds.",
        losses_that_no_graph_shows_taken,
        (
            "tests/isolation/loss_checks/test_loss_vectors.py::test_a_function_of_pythons_is_taken_once_it_was_tested[False]",
            "tests/isolation/loss_checks/test_loss_vectors.py::test_an_output_that_is_not_by_example_is_no_part_of_a_loss[False-centre]",
        ),
    ),
    Fault(
        "few examples of a batch alone are tried",
        "what only many do to each other goes unnoticed.",
        whole_batches_not_tried,
        ("tests/isolation/test_other_batches.py::test_a_capacity_that_many_fill_together_is_refused",),
    ),
    Fault(
        "backwards are not tried",
        "gradients that are normalised over the batch depend on all of it.",
        backwards_not_tried,
        ("tests/isolation/test_other_batches.py::test_a_backward_that_looks_at_the_whole_batch_is_refused",),
    ),
    Fault(
        "a forward writes to parameters",
        "what it keeps there of the examples is released without noise.",
        parameters_written_to,
        (
            "tests/isolation/model_state/test_parameters.py::test_a_parameter_that_a_forward_writes_to_is_refused_before_it_does[in place]",
            "tests/isolation/model_state/test_parameters.py::test_a_parameter_that_a_later_forward_writes_to_is_refused",
        ),
    ),
    Fault(
        "parameters beside the private model are trained",
        "an optimizer of their own releases their gradients without clip and noise.",
        parameters_beside_the_model_trained,
        (
            "tests/engine/test_beside.py::test_a_criterion_that_is_trained_is_refused[Centres-False]",
            "tests/engine/test_beside.py::test_a_module_before_the_model_is_refused_where_it_is_trained[6]",
        ),
    ),
    Fault(
        "a frozen part is unfrozen and trained by another optimizer",
        "as above.",
        frozen_parameters_thawed,
        ("tests/engine/test_beside.py::test_a_frozen_part_that_is_unfrozen_is_refused_whoever_trains_it",),
    ),
    Fault(
        "a tensor that the model hides is trained",
        "as above.",
        hidden_tensors_trained,
        ("tests/engine/test_beside.py::test_what_the_model_hides_is_refused_where_it_takes_a_gradient[plain tensor]",),
    ),
    Fault(
        "a loss that the model computes itself is taken on trust",
        "an even first batch hides that it divides by what later ones hold.",
        own_losses_trusted,
        (
            "tests/isolation/loss_checks/test_models_own_losses.py::test_a_loss_of_the_models_own_may_not_divide_by_what_a_batch_holds[False-weights]",
        ),
    ),
    Fault(
        "a batch that could not be fetched is forgotten",
        "one example that cannot be read takes away all others of its batch.",
        unfetched_batches_forgotten,
        (
            "tests/engine/test_unfetched.py::test_a_loop_that_goes_on_after_a_batch_that_could_not_be_fetched_is_refused"
            "[read-OSError-truncated image-0]",
        ),
    ),
    Fault(
        "noise is rounded to the dtype of what was summed",
        "the last bits tell empty batches from others.",
        rounded_to_the_sums_dtype,
        ("tests/privacy/test_noise.py::test_the_last_bits_do_not_tell_whether_a_batch_was_empty[3-True-SGD]",),
    ),
    Fault(
        "micro-batches of one example are not tried",
        "they are padded to the longest of the whole batch.",
        single_examples_not_tried,
        ("tests/isolation/test_single_examples.py::test_padding_is_tried_in_micro_batches_of_one[False]",),
    ),
    Fault(
        "ops of the parts of a client's batch are not compared",
        "a server's model amplifies to C and more how others' rows round, where an example decides which op runs.",
        ops_of_parts_not_compared,
        (
            "tests/fed/rounds/test_fixed_shapes.py::test_where_place_or_company_matter_each_example_is_by_itself"
            "[dp-lora-as it is-Routed]",
            "tests/fed/rounds/test_fixed_shapes.py::test_where_place_or_company_matter_each_example_is_by_itself"
            "[dp-lora-as it is-Grouped]",
        ),
    ),
    Fault(
        "a loss that was not seen is taken",
        "whatever it does to the examples.",
        unseen_losses_taken,
        (
            "tests/isolation/loss_checks/test_ways_to_backward.py::test_a_gradient_by_another_way_than_backward_is_refused",
        ),
    ),
    Fault(
        "the first batch alone is tried for mixing",
        "labels that are ignored, unequal groups and other widths come later.",
        first_batch_alone_tried,
        (
            "tests/isolation/test_batch_trials.py::test_ignored_labels_of_a_later_batch_are_refused",
            "tests/isolation/test_batch_trials.py::test_an_answer_beyond_the_tokens_of_a_later_batch_is_refused",
        ),
    ),
    Fault(
        "padding is not tried",
        "the longest example of a batch moves all others in a model that looks at padding.",
        padding_never_tried,
        (
            "tests/isolation/test_batch_trials.py::test_the_loader_tells_that_widths_vary",
            "tests/isolation/test_batch_trials.py::test_padding_is_found_without_a_mask",
        ),
    ),
    Fault(
        "one number of examples alone is tried",
        "a loss may be a sum where a mean is declared.",
        same_number_of_examples_alone_tried,
        ("tests/isolation/test_batch_trials.py::test_an_output_that_counts_the_batch_is_refused",),
    ),
    Fault(
        "collate functions are not tried",
        "an example that is mixed into two rows moves the sum by 2C and more.",
        collation_never_tried,
        ("tests/isolation/collation/test_trial.py::test_a_loader_that_mixes_is_refused_before_anything_is_released",),
    ),
    Fault(
        "a batch that was drawn and left out goes unnoticed",
        "who looks at a batch and skips it tells of it by what is missing.",
        skipped_batches_forgotten,
        (
            "tests/engine/test_skipped_batches.py::test_a_batch_that_is_skipped_is_noticed",
            "tests/engine/test_skipped_batches.py::test_the_last_batch_is_noticed_too",
        ),
    ),
    Fault(
        "masks from a seed of 32 bits",
        "whoever tries them all knows the masks, and tells neighbours apart.",
        masks_of_a_short_seed,
        (
            "tests/privacy/test_secret_state.py::test_make_private_draws_all_624_words_whatever_the_model_has_in_it[<lambda>0]",
        ),
    ),
    Fault(
        "seeded after make_private",
        "as above, for whoever knows the script.",
        seeds_taken,
        (
            "tests/privacy/test_secret_state.py::test_a_pass_after_a_seed_is_refused_until_the_state_is_renewed[<lambda>0]",
        ),
    ),
    Fault(
        "lookups measured in float32",
        "rows that cancel there have a norm of 0, and are summed as they are.",
        lookups_measured_in_float32,
        ("tests/nn/test_norms.py::test_lookups_of_one_token_that_cancel[1000000000000.0-10000.0-1.0]",),
    ),
    Fault(
        "a batch on which training fails is left out",
        "one example takes away what all others add.",
        failing_batches_left_out,
        (
            "tests/fed/rounds/test_contained_failures.py::test_an_example_on_which_training_fails_adds_nothing_and_takes_nothing_away"
            "[fetch-dp-lora]",
        ),
    ),
    Fault(
        "a node obeys the server's configuration",
        "the server chooses no noise, or a model that tells.",
        servers_obeyed,
        (
            "tests/fed/flower/test_hostile_server.py::"
            "test_what_could_harm_is_refused_by_name_and_before_any_data_are_read[('model', 'somewhere/else')]",
        ),
    ),
    Fault(
        "a node without a ledger takes part",
        "nothing counts what it releases, and its server may ask for no noise at all.",
        nodes_without_a_ledger_obey,
        (
            "tests/fed/flower/test_hostile_server.py::"
            "test_the_promise_is_the_owners_whatever_the_server_says[('epsilon', 'none')]",
            "tests/fed/flower/test_hostile_server.py::"
            "test_the_promise_is_the_owners_whatever_the_server_says[('reproducible', True)]",
        ),
    ),
    Fault(
        "a node's damaged ledger is begun anew",
        "what was spent is forgotten.",
        damaged_ledgers_begun_anew,
        (
            "tests/fed/flower/test_chained_ledgers.py::test_a_nodes_ledger_of_an_earlier_day_is_noticed[1]",
            "tests/fed/flower/test_chained_ledgers.py::test_runs_that_were_edited_are_noticed[None]",
        ),
    ),
    Fault(
        "a damaged line of the log is read",
        "it says less than was released.",
        damaged_lines_read,
        ("tests/fed/flower/test_chained_ledgers.py::test_a_client_of_a_round_edited_or_left_out_is_noticed",),
    ),
    Fault(
        "a batch that was left out is refused once alone",
        "a loop that passes over the refusal goes on, and tells of the batch by what is missing.",
        refusals_forgotten,
        (
            "tests/engine/test_skipped_batches.py::test_a_batch_that_was_not_stepped_is_refused_for_good[False]",
            "tests/engine/test_skipped_batches.py::test_a_step_on_another_batch_than_was_drawn_is_refused_for_good",
        ),
    ),
    Fault(
        "what a rare example writes to a buffer is not tried",
        "the buffer holds it without noise.",
        buffers_of_rare_batches_taken,
        (
            "tests/isolation/model_state/test_buffers.py::test_what_a_rare_example_leaves_in_a_buffer_is_refused[12-7-average]",
        ),
    ),
    Fault(
        "losses may pair each example with all others",
        "one example is in the losses of all, by its key or label.",
        pairs_with_all_others_taken,
        (
            "tests/isolation/loss_checks/test_paired_losses.py::test_what_meets_all_examples_is_refused_in_the_first_batch[product]",
        ),
    ),
    Fault(
        "what all examples share may be another in every batch",
        "one that is long, or rare, decides for all.",
        what_all_share_taken,
        (
            "tests/isolation/batches/test_shared_arguments.py::test_what_differs_from_batch_to_batch_must_change_nothing[an enumeration]",
            "tests/isolation/batches/test_shared_arguments.py::test_rows_that_are_given_in_some_batches_alone_are_refused"
            "[tensor-without0-True]",
        ),
    ),
    Fault(
        "batches of more examples than before are not compared",
        "they fill together what has room for so many.",
        larger_batches_taken,
        ("tests/isolation/test_larger_batches.py::test_what_only_more_examples_do_to_each_other_is_refused[by_score]",),
    ),
    Fault(
        "lists do not follow the examples",
        "a model that pads texts to the longest lets it move all others.",
        lists_stay_as_they_are,
        ("tests/isolation/batches/test_lists.py::test_lists_of_other_lengths_are_remembered_by_name",),
    ),
    Fault(
        "settings of a model are not looked at",
        "mixing that begins after a warm-up is not tried.",
        settings_not_looked_at,
        (
            "tests/isolation/model_state/test_parts.py::test_mixing_that_a_setting_switches_on_is_refused[entry of a dict]",
        ),
    ),
    Fault(
        "generators stay as a pass left them",
        "a state in a checkpoint tells what was drawn.",
        generators_left_as_a_pass_left_them,
        ("tests/privacy/test_secret_state.py::test_a_state_that_is_saved_after_a_step_tells_nothing_of_it",),
    ),
    Fault(
        "splits are told by any word of a path",
        "rows come twice, or private ones are validated on.",
        splits_told_by_any_word,
        ("tests/fed/data/test_split_files.py::test_the_name_of_a_class_is_no_split[classes0-train]",),
    ),
    Fault(
        "an audit does not mind steps that its canaries missed",
        "what has no noise at all passes.",
        canaries_may_miss_steps,
        ("tests/auditing/test_canaries.py::test_canaries_that_miss_steps_are_no_audit[1]",),
    ),
]
