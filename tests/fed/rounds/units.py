"""Options of runs in which whole clients are protected."""

SERVER = {"unit": "client", "noise_by": "server"}
