"""Flags, the loop, checkpoints."""
