"""``python -m lora_dp``: what is built in here, what runs where, and why something does not."""

from lora_dp.capabilities import describe

if __name__ == "__main__":
    print(describe())
