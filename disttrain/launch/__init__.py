"""Starts the processes of a run on one node or many, supervises them, and decides on one outcome."""
