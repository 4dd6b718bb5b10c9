"""Models of the federation."""
