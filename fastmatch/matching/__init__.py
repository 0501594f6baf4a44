"""Finding the permutations: by weights, by activations."""
