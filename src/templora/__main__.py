"""`python -m templora` is the `templora` command."""

from templora.cli import main

main()
