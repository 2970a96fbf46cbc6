"""Self-Adjust Softmax: does its gradient claim hold, does text gain, and what would explain a gain."""
