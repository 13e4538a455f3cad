"""The tests import the loader of the recipes' scripts as a neighbour."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
