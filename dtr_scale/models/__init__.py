"""Networks: DiT and ADM, their routing, attention, experts."""
