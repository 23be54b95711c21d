"""`python -m trimcli`: the same program as `trim`."""

from trimcli.cli.app import main

main()
