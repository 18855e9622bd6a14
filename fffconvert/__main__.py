"""`python -m fffconvert`, which `accelerate launch -m fffconvert` needs."""

from fffconvert.cli import main

main()
