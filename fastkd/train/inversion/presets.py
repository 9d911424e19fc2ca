"""Presets for the optimisation of images: a frozen dataclass, and the published values with their sources."""

from dataclasses import dataclass
from typing import Any, Literal

from ..options import BadValueError, option


@dataclass(frozen=True)
class Phase:
    """A number of steps at one resolution. Each phase restarts the optimiser and its schedule."""

    steps: int
    pool: int = 1  # the network sees the images averaged over pool x pool pixels
    jitter: int = 0  # maximum shift in pixels of the network's input by which a step rolls the images in each direction

    def __post_init__(self) -> None:
        if self.steps < 1 or self.pool < 1 or self.jitter < 0:
            raise ValueError(f"a phase needs steps and pool of 1 at least and jitter of 0 at least, got {self}")


def phases(value: Any) -> tuple[Phase, ...]:
    """Return the phases of a text STEPS[/POOL[/JITTER]],... or of a list of such texts or of mappings."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(
            Phase(*map(int, part.split("/"))) if isinstance(part, str)
            else part if isinstance(part, Phase) else Phase(**part)
            for part in parts
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise BadValueError(f"needs STEPS[/POOL[/JITTER]] by commas, got {value!r}") from error


def _two(value: Any) -> tuple[float, float]:
    try:
        first, second = map(float, value.split(",") if isinstance(value, str) else value)
    except (ValueError, TypeError) as error:
        raise BadValueError(f"needs two numbers by a comma, got {value!r}") from error
    return first, second


@dataclass(frozen=True, kw_only=True)
class Schedule:
    phases: tuple[Phase, ...] = option(
        "Phases STEPS[/POOL[/JITTER]], comma-separated, such as 2000/2/15,1000/1/30.", metavar="PHASES", read=phases
    )
    batch_size: int = option("Images per batch.", least=1, metavar="IMAGES")
    lr: float = option("Adam's learning rate.", least=0)
    betas: tuple[float, float] = option("Adam's betas, comma-separated.", metavar="X,X", read=_two)
    schedule: Literal["cosine", "constant"] = option("Schedule of the learning rate: cosine or constant.")
    warmup_steps: int = option("Steps of linear warmup before the cosine.", least=0, metavar="STEPS")
    clamp: bool = option("Clip the images to black and white after each step.")
    flip: bool = option("Mirror the batch in each step with probability 1/2.", False)
    grey: bool = option("Make greyscale images.", False)
    cell: int = option(
        "Side in pixels of the cells that are optimised as one pixel, enlarged bicubically.", 1, least=1,
        metavar="PIXELS",
    )  # fmt: skip
    noise: float = option("Standard deviation of the initial noise, in the network's normalisation.", 1.0, least=0)


@dataclass(frozen=True, kw_only=True)
class Loss:
    cross_entropy: float = option("Weight of the cross-entropy with the labels.", 1.0, least=0)
    bn: float = option('Weight of the batch-norm statistics, distance "l2".', least=0)
    first_bn: float = option("Weight of the first batch-norm layer (the others have 1).", least=0)
    tv_l1: float = option("Weight of the L1 total variation.", least=0)
    tv_l2: float = option("Weight of the L2 total variation.", least=0)
    l2: float = option("Weight of the L2 norm of the images.", least=0)
    l2_per_image: bool = option("Take the mean of the images' norms, not the norm of the whole batch.")
    intra: float = option("Weight of the intra-divergence of the pooled features.", 0.0, least=0)
    spread_margin: float = option(
        "Minimum distance between an image's features and the nearest ones of its class.", 1.0, least=0
    )
    boundary_margin: float = option("Minimum gap between a class's radius and the nearest other class.", 0.1, least=0)
    competition: float = option("Weight of the competition with --student.", 0.0, least=0)
    temperature: float = option("Temperature of the competition.", 3.0, least=0)


@dataclass(frozen=True, kw_only=True)
class Preset(Loss, Schedule):
    """Schedule, optimiser and weights of one kind of inversion; the total is the weighted sum of all terms.

    A term with weight 0 is not computed.
    """


# DeepInversion: github.com/NVlabs/DeepInversion at 2413af1.
_IMAGENET = Preset(
    phases=(Phase(2000, pool=2, jitter=15), Phase(1000, jitter=30)),  # deepinversion.py, setting 0
    batch_size=84,  # README's command
    lr=0.25,  # README's command
    betas=(0.5, 0.9),  # deepinversion.py, settings 0 and 1
    schedule="cosine",  # utils/utils.py, lr_cosine_policy
    warmup_steps=100,  # deepinversion.py
    clamp=True,  # deepinversion.py, settings 0 and 1
    bn=0.01,  # README's command
    first_bn=10.0,  # imagenet_inversion.py, --first_bn_multiplier
    tv_l1=0.0,  # imagenet_inversion.py, --tv_l1
    tv_l2=1e-4,  # imagenet_inversion.py, --tv_l2
    l2=1e-5,  # imagenet_inversion.py, --l2
    l2_per_image=True,  # deepinversion.py
    cross_entropy=1.0,  # imagenet_inversion.py, --main_loss_multiplier
    flip=True,  # README's command, --do_flip
    competition=0.0,  # README: 0.2 for adaptive inversion, with a student
    temperature=3.0,  # deepinversion.py
)
_PUBLISHED = {name: getattr(_IMAGENET, name) for name in _IMAGENET.__dataclass_fields__}

PRESETS: dict[str, Preset] = {
    "imagenet-0": _IMAGENET,
    "imagenet-1": Preset(**_PUBLISHED | {"phases": (Phase(2000, jitter=30),)}),  # deepinversion.py, setting 1
    "imagenet-2": Preset(  # deepinversion.py, setting 2
        **_PUBLISHED | {"phases": (Phase(20_000, jitter=30),), "betas": (0.9, 0.999), "clamp": False}
    ),
    "cifar": Preset(
        phases=(Phase(2000, jitter=2),),  # cifar10/deepinversion_cifar10.py
        batch_size=256,  # cifar10/README.md
        lr=0.05,  # cifar10/README.md, the paper's parameters
        betas=(0.9, 0.999),  # Adam's own
        schedule="constant",  # cifar10/deepinversion_cifar10.py
        warmup_steps=0,
        clamp=False,
        bn=10.0,  # cifar10/README.md, --r_feature_weight
        first_bn=1.0,  # cifar10/deepinversion_cifar10.py has no multiplier
        tv_l1=0.0,
        tv_l2=2.5e-5,  # cifar10/README.md, --di_var_scale
        l2=0.0,  # cifar10/deepinversion_cifar10.py, --di_l2_scale
        l2_per_image=False,  # cifar10/deepinversion_cifar10.py
    ),
    # Our own, for teachers trained on digits: benchmarks/results/demo-datafree.json has the results.
    "digits": Preset(
        phases=(Phase(100, jitter=4),),
        batch_size=100,
        lr=0.5,
        betas=(0.5, 0.9),
        schedule="cosine",
        warmup_steps=10,
        clamp=True,
        bn=0.1,
        first_bn=1.0,
        tv_l1=0.0,
        tv_l2=0.01,
        l2=0.0,
        l2_per_image=True,
        cross_entropy=5.0,
        grey=True,  # as the digits are
        cell=8,  # a digit's pixel, enlarged as the data's transform does
        noise=0.3,
    ),
}
