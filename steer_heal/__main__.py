"""`python -m steer_heal`, which is also what torchrun and `accelerate launch` take."""

from steer_heal.cli import main

main()
