"""Autoencoders and cached latents."""
