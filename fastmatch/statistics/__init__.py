"""Statistics of activations and gradients: moments, Fisher information."""
