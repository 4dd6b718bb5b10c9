"""How a loss joins the examples of a batch, followed at every backward."""
