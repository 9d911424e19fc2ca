"""Ways to compute each loss: official form in eager PyTorch, the same compiled, the best stock form, and fastkd."""
