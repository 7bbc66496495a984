"""``python -m chunkglm`` is the command line."""

from chunkglm.cli import main

if __name__ == "__main__":
    main()
