"""`python -m exaone_bridge`: the command line."""

from exaone_bridge.cli import main

if __name__ == "__main__":
    main()
