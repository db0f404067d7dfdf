"""`python -m moedistill`: the command, for launchers such as torchrun."""

from moedistill.cli import main

if __name__ == "__main__":
    main()
