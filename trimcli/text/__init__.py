"""Where text comes from, and text to token windows."""
