"""One way to measure a model, for the trainer and for users."""
