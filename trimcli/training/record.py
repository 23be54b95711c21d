"""What a training leaves in a manifest: Record.of(state), document()."""
