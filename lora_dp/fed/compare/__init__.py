"""Grids of runs, methods × ε × seeds: their cells, tables and plots."""
