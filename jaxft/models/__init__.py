"""The decoder: its config, layers, parameters by name, and what each layer keeps for the backward pass."""
