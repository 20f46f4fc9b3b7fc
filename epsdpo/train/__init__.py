"""Training one experiment: fine-tuning, preference training, and everything that surrounds them."""
