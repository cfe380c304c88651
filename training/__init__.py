"""The parts of train.py: one update, the state to continue from, and the folder of the run."""
