"""Studies: lists of runs of the four scripts on small real images, one table of their figures and one report.

    python -m experiments.run --study demo                  make demo
    python -m experiments.run --study digits,ablations      what results.csv lacks, two runs at a time
    python -m experiments.run --study cifar --size small    CIFAR-10 end to end on two CPU cores
    python -m experiments.report                            tables, comparisons and plots from results.csv
"""
