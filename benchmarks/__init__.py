"""Timings and memory of one training step against its rivals; no part of the test suite."""
