"""Pictures: where they come from, and what a model's image processor makes of them."""
