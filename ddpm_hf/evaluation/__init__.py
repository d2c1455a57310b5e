"""How good a diffusion model is: likelihood here, and what others add beside it."""
