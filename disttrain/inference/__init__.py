"""Using what was trained: evaluate, predict, export."""
