"""``lora-dp audit CONFIG``: does a configuration's training keep the ε that it claims?"""
