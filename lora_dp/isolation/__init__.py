"""Does each example keep to itself? Proofs by trial, without which no clipping of single examples means anything."""
