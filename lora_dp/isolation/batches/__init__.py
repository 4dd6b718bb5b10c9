"""A batch as a model is given it: which rows are whose, what pads them, what all examples share."""
