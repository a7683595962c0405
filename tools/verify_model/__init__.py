"""Is a checkpoint computed as transformers computes it? See `python -m tools.verify_model --help`."""
