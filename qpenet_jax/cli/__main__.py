"""`python -m qpenet_jax.cli`."""

from qpenet_jax.cli.main import program

if __name__ == "__main__":
    program()
