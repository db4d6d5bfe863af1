"""The command `python -m jlora`."""

import argparse
import json
import sys
from collections.abc import Sequence

from jlora.io.info import info

_EXIT_CODES = """\
exit codes:
  0  jlora reads the file
  1  jlora reads the file, and would refuse a part of it
  2  there is no such file, its format is unknown, or it is damaged
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Arguments:
        arguments: those of the command line; None takes the process's own.

    Returns:
        the exit code.
    """
    parser = argparse.ArgumentParser("python -m jlora", description="Low-rank adaptation of any JAX program.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser(
        "info",
        help="list what an adapter file holds, and what of it would be refused",
        description="Lists what an adapter file holds, and what of it jlora would refuse. No model is needed.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("path", help="a file, or the folder of a checkpoint, of a bank or of PEFT")
    command.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        report = info(options.path)
    except (OSError, ValueError) as error:
        if options.json:
            print(json.dumps({"path": options.path, "error": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=1) if options.json else report)
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
