"""The recipe's scripts import each other as neighbours; so do its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "quickstart"))
