"""What computes each loss: the official form in eager PyTorch, the same compiled, the cleverest stock one, fastkd."""
