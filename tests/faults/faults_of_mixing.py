"""Examples that mix, and what else goes unnoticed, with what catches each."""

from tests.faults.fed_plants import damaged_ledgers_begun_anew, nodes_without_a_ledger_obey
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
from tests.faults.planting import Fault

MIXING = [
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
            "tests/isolation/loss_checks/test_backward_calls.py::test_a_gradient_by_another_way_than_backward_is_refused",
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
