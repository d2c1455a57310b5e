"""What restoration has beyond the pipeline that is copied to the Hub: tasks by name, figures and pictures."""
