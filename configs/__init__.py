"""The configuration: all fields (default.py), and the command line that overrides them (command_line.py)."""
