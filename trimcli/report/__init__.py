"""Reports of one or several runs: HTML with figures, Markdown for a model card, and for the terminal."""
