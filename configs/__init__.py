"""The configuration: all fields (default.py), the command line that overrides them, the origin of a result."""
