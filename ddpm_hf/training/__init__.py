"""What any training needs, whatever it trains: flags, the run, checkpoints, the loop."""
