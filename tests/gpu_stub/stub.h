/* What the three parts of the stub share: the log, and what becomes of an operation on a stream. */
#pragma once
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

/* Write a line to the log, if one is open. */
void stub_log(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same with something in front of it. */
void stub_vlog(const char *before, const char *format, va_list values)
    __attribute__((format(printf, 2, 0)));
/* Queue an operation on a stream and write it to the log; waits are told by what is queued behind
 * them. A stream that is captured only takes it up, until its graph is launched. */
void stub_queue(void *stream, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Tell which GPU an index means: 80 for sm_80 (A100), 90 for sm_90 (H100). */
int stub_sm(int device);
int stub_num_gpus(void);
int stub_current_gpu(void);
/* Return address space that stands for a GPU's memory: whoever reads it on the host crashes. */
void *stub_take_device_memory(size_t bytes);
