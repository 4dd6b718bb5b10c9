"""What `flwr run` starts on the server."""

from lora_dp.fed.engines.flower import server_app

app = server_app()
