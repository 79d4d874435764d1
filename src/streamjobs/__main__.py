"""`python -m streamjobs` is `streamjobs`."""

from streamjobs.cli import main

if __name__ == "__main__":
    main()
