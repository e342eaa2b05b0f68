"""`python -m vlm_sapo` is `vlm-sapo`."""

from vlm_sapo.search_path import use_library_path

if __name__ == "__main__":
    use_library_path()
    from vlm_sapo.cli import main

    main()
