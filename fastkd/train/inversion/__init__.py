"""Images from a network alone, after DeepInversion: the command `fastkd invert`, and its parts for any loop."""
