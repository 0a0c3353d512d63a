"""Makes `python -m disttrain` the same as `disttrain`."""

from disttrain.cli import main

main()
