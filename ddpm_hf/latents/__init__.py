"""Diffusion in the latents of an autoencoder."""
