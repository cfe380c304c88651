"""The networks: building them, averaging their weights, and the files they are kept in."""

from models.checkpoint import load_model
from models.create import create_model

__all__ = ["create_model", "load_model"]
