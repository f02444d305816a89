"""What the scripts share, by subject: `data`, `weights`, `train`, `serve` and `export`; see each folder's docstring.

Without the packages of requirements.txt nothing here can be imported.
"""

from importlib.util import find_spec

if find_spec("numpy") is None:
    raise SystemExit("The packages of requirements.txt are not on the path. Set them up with: source setup_env.sh")
