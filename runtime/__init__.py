"""Shared by all scripts: terminal, files, devices, seeds, run folders, image files."""
