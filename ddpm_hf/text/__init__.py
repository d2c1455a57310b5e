"""Text-to-image models: captions and components."""
