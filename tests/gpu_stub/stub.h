/* What the three parts of the stub share: the log, and what becomes of an operation on a stream. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

/* Write a line to the log, if one is open. */
void stub_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Count an operation that is queued on a stream; waits are told by what is queued behind them. */
void stub_queued(void);
/* Tell which GPU an index means: 80 for sm_80 (A100), 90 for sm_90 (H100). */
int stub_sm(int device);
int stub_num_gpus(void);
int stub_current_gpu(void);
/* Return address space that stands for a GPU's memory: whoever reads it on the host crashes. */
void *stub_take_device_memory(size_t bytes);
