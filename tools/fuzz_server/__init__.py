"""Sends mutated requests to a server and checks that it stands: `python -m tools.fuzz_server --seed 1 --requests 10000`.

Request number i of seed s is always the same bytes, whatever ran before it. Body fields come from the server's own
openapi.json, so a new field is covered once it exists; `examples.py` has valid values for the known ones.
"""
