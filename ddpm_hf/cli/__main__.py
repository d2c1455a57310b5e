"""`python -m ddpm_hf.cli`."""

from . import main

if __name__ == "__main__":
    main()
