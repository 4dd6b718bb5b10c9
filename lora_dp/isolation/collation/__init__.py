"""A batch as a collate function makes it: whether each example is in it by itself."""
