"""Cards, uploads, Spaces."""
