"""Put generated files into the READMEs, between the marks `<!-- include FILE -->` and `<!-- end -->`.

    python -m diffmoe.report.readme            after `make publish`; run it in the repository's root
    python -m diffmoe.report.readme --check    exit 1 when a block differs from its file

A file is named from the repository's root. A block whose file is not there is empty.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from diffmoe.cli import run_command
from diffmoe.config import ConfigError

BLOCK = re.compile(r"(<!-- include (\S+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)


def fill(text: str, root: Path) -> str:
    """Return a README with each block's content replaced by that of its file below `root`."""
    def content(path: Path) -> str:
        return f"\n{path.read_text(encoding='utf-8').strip()}\n\n" if path.is_file() else ""

    return BLOCK.sub(lambda block: block[1] + content(root / block[2]) + block[4], text)


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m diffmoe.report.readme", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    differ = 0
    for path in (Path("README.md"), *sorted(Path("results").rglob("README.md"))):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); run this in the repository's root") from None
        filled = fill(text, Path())
        if filled == text:
            continue
        if options.check:
            print(f"{path}: a block differs from its file; run python -m diffmoe.report.readme", file=sys.stderr)
            differ = 1
        else:
            path.write_text(filled, encoding="utf-8")
    return differ


if __name__ == "__main__":
    sys.exit(run_command(main))
