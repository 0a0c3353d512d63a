/* A stand-in for libnvidia-ml.so.1: GPUs whose readings are simple functions of their index.
 *
 * GPU i: utilisation 10 i + 5 %, 1000 i + 100 of 81920 MiB, 100 i + 50 W, 40 + i degrees C.
 *   FAKE_NVML_GPUS=N       number of GPUs (default 4)
 *   FAKE_NVML_BROKEN=1     nvmlInit fails: the driver is not loaded
 *   FAKE_NVML_CRASH=1      nvmlInit crashes
 *   FAKE_NVML_HANG=1       nvmlInit never returns
 *   FAKE_NVML_NVLINK=n     n active NVLinks between the GPUs, one less on the last; PCIe alone without
 *   FAKE_NVML_NO_POWER=i   the power of GPU i is not supported
 *   FAKE_NVML_LOST=i:n     GPU i is lost after n readings of its utilisation
 *   FAKE_NVML_MIG=i:n      GPU i is split into n MIG instances, whose memory alone can be read
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9, LOST = 15 };
enum { MAX_GPUS = 64, MAX_MIG = 8 };

typedef struct Device {
    int gpu;
    int slot; /* -1: the whole GPU */
    int readings;
} Device;

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;

static Device devices[MAX_GPUS][1 + MAX_MIG];

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

/* The n of "i:n" for GPU i, else -1. */
static int number_for(const char *name, int gpu) {
    const char *text = getenv(name), *colon = text ? strchr(text, ':') : NULL;
    return colon && atoi(text) == gpu ? atoi(colon + 1) : -1;
}

static int count(void) { return number("FAKE_NVML_GPUS", 4); }

static int instances(int gpu) {
    int n = number_for("FAKE_NVML_MIG", gpu);
    return n < 0 ? 0 : n;
}

static int lost(const Device *device) {
    int after = number_for("FAKE_NVML_LOST", device->gpu);
    return after >= 0 && device->readings >= after;
}

static Device *device_at(int gpu, int slot) {
    Device *device = &devices[gpu][1 + slot];
    device->gpu = gpu;
    device->slot = slot;
    return device;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    if (number("FAKE_NVML_CRASH", 0)) abort();
    while (number("FAKE_NVML_HANG", 0)) sleep(1);
    return number("FAKE_NVML_BROKEN", 0) ? DRIVER_NOT_LOADED : OK;
}

int nvmlShutdown(void) { return OK; }

int nvmlSystemGetDriverVersion(char *text, unsigned int length) {
    snprintf(text, length, "999.10.05");
    return OK;
}

int nvmlSystemGetCudaDriverVersion(int *version) {
    *version = 99010; /* 99.1 */
    return OK;
}

int nvmlDeviceGetP2PStatus(Device *a, Device *b, int capability, int *status) {
    (void)a, (void)b;
    *status = capability == 2 && number("FAKE_NVML_NVLINK", 0) ? 0 : 5;
    return OK;
}

int nvmlDeviceGetTopologyCommonAncestor(Device *a, Device *b, int *level) {
    *level = a->gpu / 2 == b->gpu / 2 ? 30 : 50; /* pairs behind one host bridge */
    return OK;
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, unsigned int *active) {
    int links = number("FAKE_NVML_NVLINK", 0);
    if ((int)link >= links) return NOT_SUPPORTED;
    *active = device->gpu < count() - 1 || (int)link < links - 1;
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned int *n) {
    *n = (unsigned int)count();
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if ((int)index >= count()) return INVALID_ARGUMENT;
    *device = device_at((int)index, -1);
    return OK;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *n) {
    if (!instances(device->gpu)) return NOT_SUPPORTED;
    *n = MAX_MIG - 1;
    return OK;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int slot, Device **instance) {
    if ((int)slot >= instances(device->gpu)) return NOT_FOUND;
    *instance = device_at(device->gpu, (int)slot);
    return OK;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *instance, Device **device) {
    if (instance->slot < 0) return INVALID_ARGUMENT;
    *device = device_at(instance->gpu, -1);
    return OK;
}

int nvmlDeviceGetIndex(Device *device, unsigned int *index) {
    *index = (unsigned int)(device->slot < 0 ? device->gpu : device->slot);
    return OK;
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned int length) {
    if (device->slot < 0)
        snprintf(text, length, "GPU-%02d000000-aaaa-bbbb-cccc-0000000000%02d", device->gpu, device->gpu);
    else
        snprintf(text, length, "MIG-%02d%02d0000-aaaa-bbbb-cccc-000000000000", device->gpu, device->slot);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    char text[96];
    for (int gpu = 0; gpu < count(); gpu++)
        for (int slot = -1; slot < instances(gpu); slot++) {
            nvmlDeviceGetUUID(device_at(gpu, slot), text, sizeof text);
            if (strcmp(text, uuid) == 0) {
                *device = device_at(gpu, slot);
                return OK;
            }
        }
    return NOT_FOUND;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned int length) {
    snprintf(text, length, device->slot < 0 ? "NVIDIA Fake %d" : "NVIDIA Fake %d MIG 1g.10gb", device->gpu);
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (lost(device)) return LOST;
    memory->total = (device->slot < 0 ? 81920ull : 10240ull) << 20;
    memory->used = (1000ull * (unsigned long long)device->gpu + 100ull) << 20;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *utilization) {
    if (device->slot >= 0) return NOT_SUPPORTED;
    if (lost(device)) return LOST;
    device->readings++;
    utilization->gpu = (unsigned int)(10 * device->gpu + 5);
    utilization->memory = 0;
    return OK;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts) {
    if (device->slot >= 0 || device->gpu == number("FAKE_NVML_NO_POWER", -1)) return NOT_SUPPORTED;
    if (lost(device)) return LOST;
    *milliwatts = (unsigned int)(100000 * device->gpu + 50000);
    return OK;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
    if (sensor != 0) return INVALID_ARGUMENT;
    if (device->slot >= 0) return NOT_SUPPORTED;
    if (lost(device)) return LOST;
    *celsius = (unsigned int)(40 + device->gpu);
    return OK;
}
