"""python -m manifold_opt compare: which retraction to take, measured on this machine."""

from .compare.cli import run

if __name__ == "__main__":
    run()
