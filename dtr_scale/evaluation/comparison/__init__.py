"""Compare runs: results, settings, curves and pictures, as a page and as plots."""
