"""What the criterion decides in a real language model on real pairs, foretold before it is measured."""
