"""`python -m qpenet_jax.cli`."""

from qpenet_jax.cli.main import main

if __name__ == "__main__":
    main()
