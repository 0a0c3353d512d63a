"""What a run keeps: its folder, its records, its checkpoints."""
