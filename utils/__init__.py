"""The rooms that the scripts share; see each one's docstring. Without the packages of requirements.txt none opens."""

from importlib.util import find_spec

if find_spec("numpy") is None:
    raise SystemExit("The packages of requirements.txt are not on the path. Set them up with: source setup_env.sh")
