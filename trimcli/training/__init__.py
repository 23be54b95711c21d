"""Training that keeps every zero, or learns the masks: transformers' Trainer and peft under masks."""
