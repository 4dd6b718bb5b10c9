"""``python -m lora_dp.kernels``: compile every kernel for every architecture and print what it takes."""

from lora_dp.kernels.resources import main

if __name__ == "__main__":
    main()
