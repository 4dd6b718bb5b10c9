"""What `flwr run` starts on every node."""

from lora_dp.fed.flower.client import client_app

app = client_app()
