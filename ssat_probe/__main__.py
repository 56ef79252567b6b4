"""``python -m ssat_probe``: the command line."""

from ssat_probe.cli import main

if __name__ == "__main__":  # a spawned worker imports this file again
    main()
