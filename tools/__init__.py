"""Command line tools: benchmarks, training of the bundled model, checkpoint conversion, compile checks."""
