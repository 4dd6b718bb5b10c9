"""Native operations, one file an op: argument checks and dispatch over ``lora_dp._native``."""
