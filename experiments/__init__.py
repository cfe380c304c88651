"""The paper in miniature: lists of runs of the four scripts on small real images, their figures and their report.

    python -m experiments.run               what results.csv lacks, two processes at a time
    python -m experiments.run --quick       the main line with one seed, in logs/miniature/quick/
    python -m experiments.run --again STEP  one row anew
    python -m experiments.report            docs/miniature.md with its plots, from results.csv
"""
