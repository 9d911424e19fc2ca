"""Presets for the optimisation of images: a frozen dataclass, and the published values with their sources."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Phase:
    """A number of steps at one resolution. Each phase restarts the optimiser and its schedule."""

    steps: int
    pool: int = 1  # the network sees the images averaged over pool x pool pixels
    jitter: int = 0  # maximum shift in pixels of the network's input by which a step rolls the images in each direction

    def __post_init__(self) -> None:
        if self.steps < 1 or self.pool < 1 or self.jitter < 0:
            raise ValueError(f"a phase needs steps and pool of 1 at least and jitter of 0 at least, got {self}")


@dataclass(frozen=True)
class Preset:
    """Schedule, optimiser and weights of one kind of inversion; the total is the weighted sum of all terms.

    A term with weight 0 is not computed.
    """

    phases: tuple[Phase, ...]
    batch_size: int
    lr: float
    betas: tuple[float, float]
    schedule: Literal["cosine", "constant"]
    warmup_steps: int  # warmup steps with linearly rising learning rate before the cosine
    clamp: bool  # clip to black and white after each step
    bn: float  # fastkd.bn_stat_loss, distance "l2"
    first_bn: float  # weight of the first layer (the others have 1)
    tv_l1: float
    tv_l2: float
    l2: float
    l2_per_image: bool  # mean of the images' norms, or the whole batch's one
    cross_entropy: float = 1.0
    flip: bool = False  # each step mirrors the batch with probability 1/2
    competition: float = 0.0  # fastkd.competition_loss; needs a student
    temperature: float = 3.0  # temperature of the competition
    intra: float = 0.0  # fastkd.intra_divergence_loss on the pooled features
    spread_margin: float = 1.0
    boundary_margin: float = 0.1
    grey: bool = False  # one value for the three channels
    cell: int = 1  # side in pixels of a cell optimised as one pixel; cells are enlarged bicubically
    noise: float = 1.0  # standard deviation of the initial noise, in the network's normalisation


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
