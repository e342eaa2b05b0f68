"""Pure tensor functions: advantages, ratios, objectives, reductions, diagnostics."""
