"""What a person sees of a run: GPUs, gauges, dashboard, trackers, the verdict."""
