"""What `flwr run` starts on the server."""

from lora_dp.fed.flower.server import server_app

app = server_app()
