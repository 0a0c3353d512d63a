"""Runs an experiment with many settings: `disttrain sweep`."""
