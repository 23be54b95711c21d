"""The stages: each reads files, writes one, and is a function that a command of `trim` calls.

They lie apart from `trimcli` itself, whose names for them are the functions.
"""
