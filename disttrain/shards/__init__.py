"""Data sets on disk, as WebDataset tars and an index: packing, verifying and reading."""
