"""Faults of batches, of what is covered, and of ledgers, with what catches each."""

from tests.faults.fed_plants import (
    dealt_to_two_clients,
    no_noise_by_the_client,
    opened_by_two_clients,
    rounds_logged_late,
    server_divides_by_replies,
    server_noise_on_empty_rounds_only,
)
from tests.faults.planting import AUDIT, ISOLATION, REFUSED, SAMPLED, Fault
from tests.faults.plants import (
    batch_mean_in_a_module,
    divide_by_the_batch,
    everybody_in_every_batch,
    frozen_parameters_stepped,
    ledger_behind,
    plain_head_left_trainable,
    samplers_passed_over,
    shuffled_batches,
    step_of_swin,
    step_on_windows,
    train_a_step,
    twice_in_a_batch,
    uncovered_parameter,
    windows_counted,
    windows_of_all_examples_first,
)

BATCHES_AND_LEDGERS = [
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
]
