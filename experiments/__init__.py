"""Studies: lists of runs of the four scripts on small real images, one table of their figures and one report."""
