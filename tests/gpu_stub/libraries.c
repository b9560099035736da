/* cuBLAS, cuBLASLt and NCCL without a GPU: what they are asked for is written down.
 *
 * Matrix products that no network here needs are left to the real cuBLAS, which fails.
 */
#include "stub.h"
#include <stdlib.h>
/* Small floats, whose headers want C++ that the wheels do not bring. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>

/* ---- cuBLAS */

static cublasStatus_t product(cublasHandle_t handle, const char *name, long m, long n, long k,
                              long batch) {
    stub_queue(*(void **)handle, "GEMM %s %ld %ld %ld %ld\n", name, m, n, k, batch);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasCreate(cublasHandle_t *handle) {
    *handle = calloc(1, sizeof(cudaStream_t));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy(cublasHandle_t handle) { free(handle); return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    *(cudaStream_t *)handle = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void *workspace, size_t bytes) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                            int m, int n, int k, const void *alpha, const void *a,
                            cudaDataType type_a, int lda, const void *b, cudaDataType type_b,
                            int ldb, const void *beta, void *c, cudaDataType type_c, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    return product(handle, "GemmEx", m, n, k, 1);
}
cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *a, cudaDataType type_a, int lda, long long stride_a,
    const void *b, cudaDataType type_b, int ldb, long long stride_b, const void *beta, void *c,
    cudaDataType type_c, int ldc, long long stride_c, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t algorithm) {
    return product(handle, "GemmStridedBatchedEx", m, n, k, batch);
}
cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                           int n, int k, const float *alpha, const float *a, int lda,
                           const float *b, int ldb, const float *beta, float *c, int ldc) {
    return product(handle, "Sgemm", m, n, k, 1);
}
cublasStatus_t cublasSgemmStridedBatched(
    cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const float *alpha, const float *a, int lda, long long stride_a, const float *b, int ldb,
    long long stride_b, const float *beta, float *c, int ldc, long long stride_c, int batch) {
    return product(handle, "SgemmStridedBatched", m, n, k, batch);
}
cublasStatus_t cublasSgemv(cublasHandle_t handle, cublasOperation_t t, int m, int n,
                           const float *alpha, const float *a, int lda, const float *x, int incx,
                           const float *beta, float *y, int incy) {
    return product(handle, "Sgemv", m, 1, n, 1);
}
cublasStatus_t cublasSdot(cublasHandle_t handle, int n, const float *x, int incx, const float *y,
                          int incy, float *result) {
    return product(handle, "Sdot", 1, 1, n, 1);
}

/* ---- cuBLASLt: products with a bias or an activation in their epilogue */

struct Layout { uint64_t rows, cols; int batch; };
struct Product { int transposed, epilogue; };

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    struct Layout *made = malloc(sizeof *made);
    *made = (struct Layout){rows, cols, 1};
    *layout = (void *)made;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    free(layout);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t name,
                                                const void *value, size_t bytes) {
    if (name == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
        ((struct Layout *)layout)->batch = *(const int *)value;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *product, cublasComputeType_t compute,
                                        cudaDataType scale) {
    *product = calloc(1, sizeof(struct Product));
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) {
    free(product);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t name,
                                              const void *value, size_t bytes) {
    struct Product *set = (void *)product;
    if (name == CUBLASLT_MATMUL_DESC_TRANSA) set->transposed = *(const int *)value;
    if (name == CUBLASLT_MATMUL_DESC_EPILOGUE) set->epilogue = *(const int *)value;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = malloc(64);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    free(preference);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name,
                                                    const void *value, size_t bytes) {
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t *results,
    int *found) {
    results[0] = (cublasLtMatmulHeuristicResult_t){.state = CUBLAS_STATUS_SUCCESS};
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t layout_a, const void *b,
                              cublasLtMatrixLayout_t layout_b, const void *beta, const void *c,
                              cublasLtMatrixLayout_t layout_c, void *d,
                              cublasLtMatrixLayout_t layout_d, const cublasLtMatmulAlgo_t *algorithm,
                              void *workspace, size_t bytes, cudaStream_t stream) {
    struct Product *asked = (void *)desc;
    struct Layout *in = (void *)layout_a, *out = (void *)layout_d;
    stub_queue(stream, "GEMM LtMatmul %lu %lu %lu %d epilogue %d\n", out->rows, out->cols,
               asked->transposed ? in->rows : in->cols, in->batch, asked->epilogue);
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- NCCL: every rank but this one is imagined */

struct ncclComm { int size, rank; };

static ncclResult_t joined(ncclComm_t *comm, int size, int rank) {
    *comm = malloc(sizeof **comm);
    **comm = (struct ncclComm){size, rank};
    return ncclSuccess;
}
ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { *id = (ncclUniqueId){"stub"}; return ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return joined(comm, size, rank);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    return joined(comm, size, rank);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *comm, int size, int rank, int num_ids,
                                      ncclUniqueId *ids, ncclConfig_t *config) {
    return joined(comm, size, rank);
}
/* A part of the ranks: NCCL counts those of one color. Here Python tells, which has made the parts;
 * else it is all of them. */
static int part_size;
void stub_part_size(int size) { part_size = size; }
ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t *comm,
                           ncclConfig_t *config) {
    return joined(comm, part_size ? part_size : from->size, key);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return ncclSuccess; }
ncclResult_t ncclCommFinalize(ncclComm_t comm) { return ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t comm, int *count) {
    *count = comm->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclCommRegister(const ncclComm_t comm, void *buffer, size_t bytes, void **handle) {
    return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle) { return ncclSuccess; }
const char *ncclGetErrorString(ncclResult_t error) { return "an error of the stub"; }
const char *ncclGetLastError(ncclComm_t comm) { return ""; }
ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t *info) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void **address, size_t bytes) {
    return (*address = stub_take_device_memory(bytes)) ? ncclSuccess : ncclSystemError;
}
ncclResult_t ncclMemFree(void *address) { return ncclSuccess; }
ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *op, void *scalar, ncclDataType_t type,
                                      ncclScalarResidence_t residence, ncclComm_t comm) {
    *op = ncclNumOps;
    return ncclSuccess;
}
ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t comm) { return ncclSuccess; }

/* `bytes` is the larger of what goes in and what comes out: the whole tensor. */
static ncclResult_t exchanged(const char *name, size_t elements, ncclDataType_t type,
                              ncclComm_t comm, cudaStream_t stream) {
    static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    stub_queue(stream, "NCCL %p %s %d %zu\n", (void *)stream, name, comm->size,
               elements * sizes[type]);
    return ncclSuccess;
}
ncclResult_t ncclAllReduce(const void *in, void *out, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return exchanged("all_reduce", count, type, comm, stream);
}
ncclResult_t ncclReduce(const void *in, void *out, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
    return exchanged("reduce", count, type, comm, stream);
}
ncclResult_t ncclBroadcast(const void *in, void *out, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return exchanged("broadcast", count, type, comm, stream);
}
ncclResult_t ncclBcast(void *buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return exchanged("broadcast", count, type, comm, stream);
}
ncclResult_t ncclAllGather(const void *in, void *out, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return exchanged("all_gather", count * comm->size, type, comm, stream);
}
ncclResult_t ncclReduceScatter(const void *in, void *out, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return exchanged("reduce_scatter", count * comm->size, type, comm, stream);
}
ncclResult_t ncclSend(const void *in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return exchanged("send", count, type, comm, stream);
}
ncclResult_t ncclRecv(void *out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return exchanged("recv", count, type, comm, stream);
}
