"""What can be verified of a config without a GPU, a network, or any training."""
