"""The HTTP server: an OpenAI-compatible FastAPI app over jinfer's public names. `python -m jinfer.serve` runs it."""
