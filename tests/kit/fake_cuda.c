/* A stand-in for libcuda.so.1: the GPUs of fake_nvml.c, as far as CUDA describes them without a context.
 *
 *   FAKE_NVML_GPUS=N          number of GPUs (default 4)
 *   FAKE_CUDA_INTEGRATED=i    GPU i shares the system's memory
 *   FAKE_CUDA_BROKEN=1        cuInit fails: driver and library do not match
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, NOT_MATCHING = 803, INTEGRATED = 18 };

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned int flags) {
    (void)flags;
    return number("FAKE_CUDA_BROKEN", 0) ? NOT_MATCHING : OK;
}

int cuDeviceGetCount(int *count) {
    *count = number("FAKE_NVML_GPUS", 4);
    return OK;
}

int cuDeviceGet(int *device, int index) {
    *device = index;
    return OK;
}

int cuDeviceGetName(char *text, int length, int device) {
    snprintf(text, (size_t)length, "NVIDIA Fake %d", device);
    return OK;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    unsigned char bytes[16] = {0, 0, 0, 0, 0xaa, 0xaa, 0xbb, 0xbb, 0xcc, 0xcc};
    bytes[0] = bytes[15] = (unsigned char)device; /* below 10 hexadecimal digits are the decimal ones */
    memcpy(uuid, bytes, sizeof bytes);
    return OK;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    (void)device;
    *bytes = (size_t)81920 << 20;
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != INTEGRATED) return INVALID_VALUE;
    *value = number("FAKE_CUDA_INTEGRATED", -1) == device;
    return OK;
}
