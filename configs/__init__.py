"""The configuration: every field once (default.py), and the command line that overrides it (command_line.py)."""
