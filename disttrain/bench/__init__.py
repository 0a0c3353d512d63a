"""What a machine and a recipe can do, measured with the parts of a run: bench, tune."""
