"""`python -m minigpt` is `minigpt`."""

from minigpt.cli import main

main()
