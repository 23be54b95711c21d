"""One function a command, each from files to a file; `trimcli.cli` parses for them and prints."""
