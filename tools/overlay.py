# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Build, install and maintain this repository's patches and files on vLLM.

See patches/README.md for the patch format.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from vllm_overlay import author, extension, installed, upstream, wheel  # noqa: E402
from vllm_overlay.base import BaseWheel, fetch, find_device, load_base  # noqa: E402
from vllm_overlay.common import CHECKOUT, OverlayError  # noqa: E402

PATCHES = CHECKOUT / "patches"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="overlay.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("device", help="print the device that would be built for")

    commands.add_parser("extension", help="compile the kernels for CPU")

    command = commands.add_parser("build", help="build the patched wheel")
    command.add_argument("--out", type=Path, default=CHECKOUT / "build" / "dist")

    command = commands.add_parser("apply", help="overlay an installed vLLM")
    command.add_argument("--into", type=Path, required=True, metavar="SITE_PACKAGES")
    modes = command.add_mutually_exclusive_group()
    modes.add_argument(
        "--link", action="store_true", help="link added files to the checkout"
    )
    modes.add_argument(
        "--check", action="store_true", help="only compare with the checkout"
    )
    modes.add_argument("--revert", action="store_true", help="take the overlay off")

    command = commands.add_parser("upstream", help="make the pull request")
    command.add_argument("--source", required=True, help="source tree, or 'sdist'")
    command.add_argument("--version", help="another release that patches/ knows")
    command.add_argument("--out", type=Path, required=True, help="folder to make")

    command = commands.add_parser("edit", help="make commits of the patches")
    command.add_argument("tree", type=Path, help="git repository to make")

    command = commands.add_parser("save", help="make patches of the commits")
    command.add_argument("tree", type=Path, help="git repository that `edit` made")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "device":
        print(find_device())
    elif arguments.command == "extension":
        print(extension.build(CHECKOUT))
    elif arguments.command == "build":
        extension.build(CHECKOUT)
        device = find_device()
        base = BaseWheel(fetch(device))
        lock = load_base(device)
        print(wheel.build_wheel(base, lock, device, CHECKOUT, arguments.out))
    elif arguments.command == "apply":
        if arguments.check:
            differences = installed.check(arguments.into, CHECKOUT)
            print("\n".join(differences) or f"{arguments.into}: equals the checkout")
            return 1 if differences else 0
        if arguments.revert:
            print(installed.revert(arguments.into, CHECKOUT))
        else:
            print(installed.apply(arguments.into, CHECKOUT, arguments.link))
    elif arguments.command == "upstream":
        print(
            upstream.export(
                arguments.source, arguments.out, CHECKOUT, arguments.version
            )
        )
    elif arguments.command == "edit":
        print(author.start_edit(BaseWheel(fetch("cpu")), PATCHES, arguments.tree))
    elif arguments.command == "save":
        print(author.save(arguments.tree, PATCHES))
    return 0


def main() -> int:
    """Run the command line."""
    try:
        return _run(_parser().parse_args())
    except OverlayError as error:
        print(f"overlay.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
