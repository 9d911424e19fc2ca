"""The command line: fastkd train | eval | look | export | invert | info, the same as python -m fastkd."""

import sys

TRAIN_LIBRARIES = {"jsonargparse", "matplotlib", "safetensors", "sklearn", "timm", "torchvision", "tqdm", "yaml"}


def main() -> None:
    """Run the command in sys.argv; `info` needs torch alone, the rest the extra `train`."""
    try:
        if sys.argv[1:2] == ["info"]:
            from fastkd.info import main as info

            sys.exit(info())
        from fastkd.train.cli import main as command

        sys.exit(command())
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in TRAIN_LIBRARIES:
            raise
        print(f"fastkd: {error.name} is missing; install it with: pip install 'fastkd[train]'", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
