/* The CUDA runtime without a GPU: kernels do nothing and are written down.
 *
 * Memory of a GPU is address space that nobody may touch, so that code which reads it on the host
 * crashes here as it would there. Every number that is copied from it is 0.
 */
#define _GNU_SOURCE
#include "stub.h"
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <cuda_runtime_api.h>

/* ---- the log */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static FILE *log_file;

/* Called from Python: write to `path` from now on, or nowhere. */
void stub_open_log(const char *path) {
    pthread_mutex_lock(&mutex);
    if (log_file) fclose(log_file);
    log_file = path && *path ? fopen(path, "a") : NULL;
    pthread_mutex_unlock(&mutex);
}

/* Called from Python: what follows belongs to this part of a step. */
void stub_mark(const char *name) { stub_log("MARK %s\n", name); }

void stub_log(const char *format, ...) {
    va_list values;
    va_start(values, format);
    stub_vlog("", format, values);
    va_end(values);
}
void stub_vlog(const char *before, const char *format, va_list values) {
    pthread_mutex_lock(&mutex); /* backwards, data and checkpoints run in threads of their own */
    if (log_file) {
        fputs(before, log_file);
        vfprintf(log_file, format, values);
    }
    pthread_mutex_unlock(&mutex);
}

/* ---- devices */

static __thread int current_gpu;

/* STUB_GPUS=80,90 is a machine with an A100 and an H100. */
static int sms(int *found, int room) {
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    if (list && !*list) return 0;
    int count = 0;
    for (list = getenv("STUB_GPUS"); list && *list && count < room; list += strspn(list, ","))
        found[count++] = strtol(list, (char **)&list, 10);
    return count;
}
int stub_num_gpus(void) { int found[16]; return sms(found, 16); }
int stub_sm(int device) { int found[16] = {90}; sms(found, 16); return found[device]; }
int stub_current_gpu(void) { return current_gpu; }

cudaError_t cudaGetDeviceCount(int *count) {
    *count = stub_num_gpus();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = current_gpu; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_gpu = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) {
    return error >= cudaErrorStreamCaptureUnsupported ? "not permitted when a stream is capturing"
                                                      : "an error of the stub";
}
const char *cudaGetErrorName(cudaError_t error) { return "stub"; }

/* Sizes of the two chips that choose kernels, from NVIDIA's tuning guides. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    bool hopper = stub_sm(device) >= 90;
    *p = (struct cudaDeviceProp){
        .totalGlobalMem = 80ull << 30, .sharedMemPerBlock = 48 << 10, .regsPerBlock = 65536,
        .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .major = stub_sm(device) / 10,
        .minor = stub_sm(device) % 10, .multiProcessorCount = hopper ? 132 : 108,
        .maxThreadsPerMultiProcessor = 2048, .regsPerMultiprocessor = 65536,
        .sharedMemPerMultiprocessor = (hopper ? 228 : 164) << 10,
        .sharedMemPerBlockOptin = (hopper ? 227 : 163) << 10,
        .l2CacheSize = (hopper ? 50 : 40) << 20, .memoryBusWidth = 5120, .clockRate = 1410000,
        .memoryClockRate = 1593000, .textureAlignment = 512, .unifiedAddressing = 1,
        .concurrentKernels = 1, .asyncEngineCount = 3, .cooperativeLaunch = 1,
        .canMapHostMemory = 1, .maxBlocksPerMultiProcessor = 32,
    };
    snprintf(p->name, sizeof p->name, "stub of %s", hopper ? "an H100" : "an A100");
    p->uuid.bytes[0] = device + 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor:
            *value = 65536; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrCooperativeLaunch: case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *name, int room, int device) {
    snprintf(name, room, "0000:0%d:00.0", device + 1);
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0; *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = NULL;
    return cudaSuccess;
}
/* Newer parts of the driver that PyTorch does without. */
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    *function = NULL;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorSymbolNotFound;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPoint(name, function, flags, result);
}

/* ---- kernels */

typedef struct Kernel { const void *handle; const char *name; struct Kernel *next; } Kernel;
enum { NUM_BUCKETS = 1 << 16 };
static Kernel *kernels[NUM_BUCKETS];

static Kernel **bucket(const void *handle) {
    return &kernels[((uintptr_t)handle >> 4) * 2654435761u % NUM_BUCKETS];
}
static const char *kernel_name(const void *handle) {
    for (Kernel *kernel = *bucket(handle); kernel; kernel = kernel->next)
        if (kernel->handle == handle) return kernel->name;
    return "unknown";
}

/* Called by every library that nvcc made, when it is loaded. */
void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 0; }
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external,
                       size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **binary, const char *handle, char *function, const char *name,
                            int limit, void *tid, void *bid, void *block, void *grid, int *warps) {
    Kernel *kernel = malloc(sizeof *kernel), **first = bucket(handle);
    *kernel = (Kernel){handle, name, *first};
    *first = kernel;
}

/* What stands between <<< and >>>, kept until the launch. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } launch;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    launch.grid = grid, launch.block = block, launch.shared = shared, launch.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = launch.grid, *block = launch.block, *shared = launch.shared;
    *(void **)stream = launch.stream;
    return cudaSuccess;
}

static cudaError_t launched(cudaStream_t stream, const void *handle) {
    stub_queue(stream, "KERNEL %p %s\n", (void *)stream, kernel_name(handle));
    return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *handle, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
    return launched(stream, handle);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *handle,
                                void **arguments) {
    return launched(config->stream, handle);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *handle) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = stub_sm(current_gpu),
        .ptxVersion = stub_sm(current_gpu), .maxDynamicSharedSizeBytes = 48 << 10,
    };
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *handle, enum cudaFuncAttribute name, int value) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *handle, int block_size, size_t shared, unsigned flags) {
    *blocks = block_size ? 2048 / block_size : 8;
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = (void *)symbol;
    return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* ---- memory: two ranges of addresses, handed out from their beginnings and not taken back */

typedef struct { char *start, *next; size_t room; int protection; } Range;
static Range device_memory = {.room = 1ull << 44, .protection = PROT_NONE};
static Range pinned_memory = {.room = 1ull << 40, .protection = PROT_READ | PROT_WRITE};

static void *take(Range *range, size_t bytes) {
    pthread_mutex_lock(&mutex);
    if (!range->start)
        range->next = range->start = mmap(NULL, range->room, range->protection,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *found = range->next;
    range->next += (bytes + 4096) & -4096ull;
    bool fits = range->start != MAP_FAILED && range->next <= range->start + range->room;
    pthread_mutex_unlock(&mutex);
    return fits ? found : NULL;
}
static bool in(const Range *range, const void *address) {
    return range->start && (char *)address >= range->start && (char *)address < range->next;
}
void *stub_take_device_memory(size_t bytes) { return take(&device_memory, bytes); }

cudaError_t cudaMalloc(void **address, size_t bytes) {
    stub_log("MALLOC %zu\n", bytes);
    return (*address = take(&device_memory, bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) {
    return cudaMalloc(address, bytes);
}
cudaError_t cudaFree(void *address) { return cudaSuccess; }
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    stub_log("HOSTALLOC %zu\n", bytes);
    return (*address = take(&pinned_memory, bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *address) { return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = 78ull << 30, *total = 80ull << 30;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    bool device = in(&device_memory, address), pinned = in(&pinned_memory, address);
    *found = (struct cudaPointerAttributes){
        .type = device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost
                                                       : cudaMemoryTypeUnregistered,
        .device = device ? current_gpu : -1,
        .devicePointer = device || pinned ? (void *)address : NULL,
        .hostPointer = device ? NULL : (void *)address,
    };
    return cudaSuccess;
}

/* Copy, and tell from where to where: memory of the host is pinned, or pageable and waited for. */
static cudaError_t copied(const char *how, void *to, const void *from, size_t bytes, void *stream) {
    bool to_device = in(&device_memory, to), from_device = in(&device_memory, from);
    const char *host = in(&pinned_memory, to_device ? from : to) ? "pinned" : "pageable";
    if (to_device || from_device) {
        stub_queue(stream, "%s %p %s %s %zu\n", how, stream,
                   to_device && from_device ? "D2D" : to_device ? "H2D" : "D2H",
                   to_device && from_device ? "device" : host, bytes);
    }
    if (!to_device && from_device) memset(to, 0, bytes);
    if (!to_device && !from_device) memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copied("COPYWAIT", to, from, bytes, NULL);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copied("COPY", to, from, bytes, stream);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int gpu, const void *from, int from_gpu, size_t bytes,
                                cudaStream_t stream) {
    return copied("COPY", to, from, bytes, stream);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        copied("COPY", (char *)to + row * to_pitch, (char *)from + row * from_pitch, width, stream);
    return cudaSuccess;
}
static cudaError_t filled(void *to, int value, size_t bytes, void *stream) {
    stub_queue(stream, "MEMSET %p %zu\n", stream, bytes);
    if (!in(&device_memory, to)) memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return filled(to, value, bytes, NULL); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    return filled(to, value, bytes, stream);
}
