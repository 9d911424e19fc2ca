"""The losses chunk by chunk in plain PyTorch: runs on any device and holds no N x N map. Same operators as kernels/."""
