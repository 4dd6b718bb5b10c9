"""``python -m lora_dp.fed``: the same as the command ``lora-dp``."""

import sys

from lora_dp.fed.cli import main

if __name__ == "__main__":
    sys.exit(main())
