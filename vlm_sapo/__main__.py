"""`python -m vlm_sapo` is `vlm-sapo`."""

from vlm_sapo.cli import main

if __name__ == "__main__":
    main()
