"""The round loop: what clients train, what travels, how the server sums it, what all of it releases."""
