"""Tests of dtr_scale, a package: site-packages may hold another `tests`, of torch-fidelity."""
