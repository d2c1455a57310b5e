"""What is fitted to a trained model so that it samples, or codes, in few steps: variances, timesteps, weights."""
