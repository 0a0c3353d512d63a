"""From a command to running processes on one node or many, and from their end to one outcome."""
