"""Publishing a trained pipeline: model card, upload, Space."""
