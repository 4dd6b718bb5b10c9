"""What of a model may change while it trains: its modules, its buffers, its parameters."""
