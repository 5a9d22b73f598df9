"""`python -m loratune`, also under `accelerate launch -m loratune` and torchrun."""

from loratune.cli import main

main()
