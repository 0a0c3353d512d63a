"""Data sets on disk: plain WebDataset tars and an index, packed, verified and read."""
