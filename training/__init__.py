"""What train.py calls: one update, the state that it goes on from, and the folder of the run."""
