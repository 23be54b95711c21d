"""peft adapters whose product the masks hold: add_adapters(model, targets, keep_of, options)."""
