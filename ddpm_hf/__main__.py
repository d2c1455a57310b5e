"""`python -m ddpm_hf` is `ddpm-hf`."""

from .cli import main

if __name__ == "__main__":
    main()
