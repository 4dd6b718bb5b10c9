"""The federation on Flower: server, nodes, messages, and the node's own ledger and policy."""
