"""What train.py calls: the guarded update, the state on disk, the run folder, the records and the snapshots."""
