"""What wraps the network to train it: one process, FSDP2, DeepSpeed ZeRO, flat buffers."""
