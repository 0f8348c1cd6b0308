"""`python -m pocketglm` is `pocketglm`."""

from pocketglm.cli._main import main

if __name__ == "__main__":
    main()
