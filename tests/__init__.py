"""A package, so that `python -m tests.bench` takes no other folder called tests that lies on the path."""
