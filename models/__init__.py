"""The networks: building them, averaging their weights, reading and writing their checkpoints."""

from models.checkpoint import load_model
from models.create import create_model

__all__ = ["create_model", "load_model"]
