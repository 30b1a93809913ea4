# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m monai_ssl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from monai_ssl import __version__
from monai_ssl.bundle_export import export_bundle
from monai_ssl.matching_commands import add_matching_commands, joined_points
from monai_ssl.registration_commands import add_registration_command

DESCRIPTION = """Self-supervised pretraining of 3D medical image networks, native to MONAI.

Training, evaluation and inference are MONAI bundles, run by MONAI itself:
  python -m monai.bundle run --config_file bundles/NAME/configs/train.yaml --dataset_dir DIR
"""

EXPORT = """Copy the bundle SRC to OUT and write a JSON twin of each YAML file in its configs/, the form that
monai.bundle.load, federated learning (MonaiAlgo) and the Model Zoo's checks read. Of models/ only the weights
travel; logs, checkpoints and reports stay behind. Refuses files over 25 MB that SRC/large_files.yml does not
name, and prints what the Model Zoo asks for and the bundle lacks, such as models/model.pt before training."""


def _export(args: argparse.Namespace) -> int:
    missing = export_bundle(args.src, args.out)
    print(f"exported {args.src} to {args.out}")
    for sentence in missing:
        print(f"  still to do for the Model Zoo: {sentence}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand per command."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m monai_ssl", description=DESCRIPTION, formatter_class=text)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    summary = "copy a bundle into the form that the Model Zoo and monai.bundle.load read"
    export = commands.add_parser("export_bundle", help=summary, description=EXPORT, formatter_class=text)
    export.add_argument("src", metavar="SRC", help="folder of the bundle")
    export.add_argument("out", metavar="OUT", help="folder to write, absent or empty")
    export.set_defaults(run=_export)
    add_matching_commands(commands)
    add_registration_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; by default the process's own.

    Returns:
        The exit status: 0, or 1 after an error, which is printed in one line.
    """
    args = build_parser().parse_args(joined_points(sys.argv[1:] if arguments is None else arguments))
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
