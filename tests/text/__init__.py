"""Captions, text to image."""
