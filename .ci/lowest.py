"""Prints the lowest versions that pyproject.toml allows, as constraints for pip: `name==version`, one a line.

python .ci/lowest.py [EXTRA ...] > constraints.txt
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = [r for extra in sys.argv[1:] for r in project["optional-dependencies"][extra]]
for requirement in project["dependencies"] + extras:
    if bound := re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement.replace(" ", "")):
        print(f"{bound[1]}=={bound[2]}")
