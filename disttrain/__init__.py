"""disttrain trains image classifiers on one GPU, many GPUs or many nodes from one YAML file."""

__version__ = "0.1.0"
