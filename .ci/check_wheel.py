"""Checks an installed wheel from outside the checkout: every tracked file is there and imports.

python check_wheel.py CHECKOUT
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import moe_engine


def main(checkout: Path) -> None:
    """Exit with a message that names what is wrong."""
    package = Path(moe_engine.__file__).parent
    if package.is_relative_to(checkout):
        sys.exit(f"moe_engine comes from the checkout: {package}")

    listing = subprocess.run(
        ["git", "-C", checkout, "ls-files", "moe_engine", "kernels"],
        check=True,
        capture_output=True,
        text=True,
    )
    tracked = [
        path.replace("kernels/", "moe_engine/kernels/", 1) if path.startswith("kernels/") else path
        for path in listing.stdout.splitlines()
    ]
    missing = [path for path in tracked if not (package.parent / path).is_file()]
    if missing:
        sys.exit(f"the wheel lacks {missing}; data files are listed in pyproject.toml")

    modules = [module.name for module in pkgutil.walk_packages([str(package)], "moe_engine.")]
    for name in modules:
        importlib.import_module(name)
    print(f"{len(tracked)} files are in the wheel, {len(modules)} modules import")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
