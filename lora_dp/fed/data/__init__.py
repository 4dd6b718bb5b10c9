"""Data of the federation: opened, split over clients, encoded."""
