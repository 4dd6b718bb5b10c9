"""The main job, ``python -m lora_dp.fed``: a federation that fine-tunes adapters in private.

Clients hold real examples and train adapters on a shared frozen backbone with example-level differential
privacy; a server combines what they release. See ``python -m lora_dp.fed --help``.
"""
