"""`python -m edgecomp`."""
from edgecomp.cli import main

main()
