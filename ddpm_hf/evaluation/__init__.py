"""How good a diffusion model is: likelihood."""
