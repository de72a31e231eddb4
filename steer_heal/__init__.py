"""Steer, filter, heal, stack: from two opposite personas to an ordinary LoRA adapter."""

__version__ = "0.1.0"
