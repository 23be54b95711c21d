"""transformers' Trainer for one run: Finetuner, arguments_of(options), train(trainer, folder)."""
