"""Loading and samplers."""
