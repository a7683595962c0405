"""Tries a chat template with the histories that clients send; see `__main__.py`."""
