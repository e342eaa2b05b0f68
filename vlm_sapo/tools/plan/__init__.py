"""`vlm-sapo plan`: what a config takes on given GPUs."""
