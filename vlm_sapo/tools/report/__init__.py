"""`vlm-sapo report`: one HTML page of runs."""
