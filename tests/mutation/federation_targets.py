"""The federation: which tests are to notice a mutant of each file."""

from tests.mutation.target import Target

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

FEDERATION: dict[str, Target] = {
    "lora_dp/fed/data/split_files.py": Target(
        (
            "tests/fed/data/test_split_files.py",
            "tests/fed/data/test_datasets.py",
            "tests/fed/data/test_opening.py",
            "tests/fed/data/test_encoding.py",
            "tests/fed/data/test_options.py",
        )
    ),
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
    "lora_dp/fed/models/completion_loss.py": Target(
        ("tests/fed/models/test_completion_loss.py", "tests/fed/models/test_task_losses.py")
    ),
    "lora_dp/fed/data/completions.py": Target(("tests/fed/data/test_completions.py",)),
    "lora_dp/fed/data/columns.py": Target(("tests/fed/data/test_columns.py",)),
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
    "lora_dp/fed/rounds/seeds.py": Target(
        (
            "tests/fed/rounds/test_seeds.py",
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
    "lora_dp/fed/data/other_company.py": Target(
        ("tests/fed/rounds/test_fixed_shapes.py", "tests/fed/data/test_kept_activations.py")
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
}
