"""Recipes: configuration files with the settings of the papers, each value with its source in a comment."""

from pathlib import Path

# In the order of the papers, and from small to large students.
RECIPES = (
    "manifold-deit-tiny",
    "manifold-deit-small",
    "manifold-swin-tiny",
    "vitkd-deit-tiny",
    "vitkd-deit-small",
    "vitkd-deit-base",
    "vitkd-nkd-deit-tiny",
    "vitkd-nkd-deit-small",
    "vitkd-nkd-deit-base",
    "dearkd-deit-tiny",
    "dearkd-deit-small",
    "dearkd-deit-base",
    "dearkd-mhca-deit-tiny",
    "cikd-vit-tiny",
)


def recipe(name: str) -> Path:
    """Return the file of a recipe."""
    return Path(__file__).with_name(f"{name}.yaml")
