"""Engines that train the network: one process, FSDP2, DeepSpeed ZeRO, flat buffers."""
