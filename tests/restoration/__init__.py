"""Figures, pictures and tasks of restoration."""
