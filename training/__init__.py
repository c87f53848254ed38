"""Training: the model with class prompts and proxies, the Trainer, checkpoints, sharing."""
