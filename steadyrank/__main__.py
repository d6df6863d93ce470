"""`python -m steadyrank`."""

from .cli import main

main()
