"""Studies: lists of runs of the four scripts on small real images, one table of their results, and one report."""
