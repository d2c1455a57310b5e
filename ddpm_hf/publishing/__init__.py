"""From a trained pipeline to a repository that a stranger can use."""
