/* Streams, events and graphs: all that is queued is done at once, or taken up by a capture.
 *
 * One capture at a time, as PyTorch has it. What CUDA refuses inside of it is refused here.
 */
#include "stub.h"
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <cuda_runtime_api.h>

static _Atomic long num_queued;
static long num_graphs;
static uintptr_t next_handle = 4096;
static void *new_handle(void) { return (void *)__sync_fetch_and_add(&next_handle, 16); }

/* ---- captures */

enum { MAX_STREAMS = 16 };
static struct {
    unsigned long long id; /* of the newest */
    int num_streams;       /* 0: there is none; the first is where it began */
    struct { cudaStream_t handle; long last; bool joined; } streams[MAX_STREAMS];
    long num_nodes;
    pthread_t thread;
    cudaError_t error;
} capture;

/* Return a stream's place in the capture, -1 if it is not part of it. */
static int place(cudaStream_t stream) {
    for (int i = 0; i < capture.num_streams; i++)
        if (capture.streams[i].handle == stream) return i;
    return -1;
}
static cudaError_t broken(cudaError_t error) { return capture.error = error; }
/* Whether the thread that captures would wait for what is only being written down. */
static bool waits_for_capture(void) {
    return capture.num_streams && pthread_equal(capture.thread, pthread_self());
}

void stub_queue(void *stream, const char *format, ...) {
    int at = place(stream);
    if (at < 0) num_queued++;
    else capture.streams[at].last = ++capture.num_nodes, capture.streams[at].joined = !at;
    va_list values;
    va_start(values, format);
    stub_vlog(at < 0 ? "" : "CAPTURED ", format, values);
    va_end(values);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (!stream) return cudaErrorStreamCaptureUnsupported; /* the default stream */
    if (capture.num_streams) return cudaErrorIllegalState;
    capture.id++, capture.num_streams = 1, capture.num_nodes = 0, capture.error = cudaSuccess;
    capture.streams[0].handle = stream, capture.streams[0].joined = true;
    capture.thread = pthread_self();
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    bool joined = true;
    for (int i = 0; i < capture.num_streams; i++) joined &= capture.streams[i].joined;
    capture.num_streams = 0, *graph = NULL;
    if (capture.error) return cudaErrorStreamCaptureInvalidated;
    if (!joined) return cudaErrorStreamCaptureUnjoined;
    *graph = malloc(sizeof(long));
    *(long *)*graph = capture.num_nodes;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = place(stream) < 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, size_t *count) {
    if (id) *id = place(stream) < 0 ? 0 : capture.id;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = *(long *)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph,
                                          unsigned long long flags) {
    *ready = malloc(sizeof(long));
    *(long *)*ready = *(long *)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph,
                                 unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(ready, graph, flags);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) { free(ready); return cudaSuccess; }
/* Called from Python: how many graphs were launched. */
long stub_num_graphs(void) { return num_graphs; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
    long num_nodes = *(long *)ready;
    num_queued += num_nodes;
    num_graphs++;
    stub_log("GRAPH %p %ld\n", (void *)stream, num_nodes);
    return cudaSuccess;
}

/* ---- streams and events: what the host waits for is told */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = new_handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    stub_log("WAIT stream 0\n");
    return place(stream) < 0 ? cudaSuccess : broken(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaDeviceSynchronize(void) {
    stub_log("WAIT device 0\n");
    return waits_for_capture() ? broken(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

/* An event knows how much was queued before it: a wait is no wait where a step has been since. In a
 * capture it knows the stream, and the last of its operations. */
typedef struct { long queued; unsigned long long capture; int place; long last; } Event;
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = calloc(1, sizeof(Event));
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return cudaEventCreate(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    int at = place(stream);
    *(Event *)event = at < 0 ? (Event){.queued = num_queued}
                             : (Event){num_queued, capture.id, at, capture.streams[at].last};
    stub_log("RECORD %p %p\n", (void *)stream, (void *)event);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    stub_log("WAIT event %ld\n", num_queued - ((Event *)event)->queued);
    return ((Event *)event)->capture ? cudaErrorCapturedEvent : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t stop) {
    *ms = 0.05f;
    bool captured = ((Event *)start)->capture || ((Event *)stop)->capture;
    return captured ? cudaErrorInvalidResourceHandle : cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    stub_log("AFTER %p %p\n", (void *)stream, (void *)event);
    Event *before = (Event *)event;
    int at = place(stream);
    if (!capture.num_streams || before->capture != capture.id)
        /* A graph cannot depend on what is not in it. */
        return at < 0 ? cudaSuccess : broken(cudaErrorStreamCaptureIsolation);
    if (at < 0) { /* a stream that waits for captured work is captured from then on */
        if (capture.num_streams == MAX_STREAMS) return cudaErrorNotSupported;
        capture.streams[at = capture.num_streams++].handle = stream;
        capture.streams[at].last = 0, capture.streams[at].joined = false;
    }
    /* It must be waited for, to its last operation, by the stream where the capture began. */
    if (!at && before->last == capture.streams[before->place].last)
        capture.streams[before->place].joined = true;
    return cudaSuccess;
}
