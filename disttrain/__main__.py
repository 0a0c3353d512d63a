"""Runs the `disttrain` command as `python -m disttrain`."""

from disttrain.cli import main

if __name__ == "__main__":  # packing processes import this module too
    main()
