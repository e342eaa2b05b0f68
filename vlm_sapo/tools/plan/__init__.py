"""`vlm-sapo plan`: the memory that a config takes on given GPUs."""
