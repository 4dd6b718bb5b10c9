"""Triton kernels, one file a kernel with its launcher; importable as ``lora_dp.kernels``."""
