"""Checks, choice of backend and autograd of every loss; the only autograd.Functions of the package."""
