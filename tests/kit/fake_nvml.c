/* A stand-in for libnvidia-ml.so.1: GPUs whose readings are simple functions of their number.
 *
 * GPU i is /dev/nvidia<i> at PCI bus 16 + i. It has: utilisation 10 i + 5 % and 2 i + 1 % of its memory
 * controller; 1000 i + 100 of 81920 MiB used and 600 kept by the driver; 100 i + 50 of 700 W; 40 + i degrees C;
 * clocks of 1900 + i and 2600 + i MHz; i corrected and no uncorrected memory errors; 3 i + 1.5 % SM and
 * 2 i + 0.25 % tensor activity; 100 i + 10 MiB/s received and 100 i + 20 sent over PCIe, ten times that over
 * NVLink; processes 1000 + i with 700 MiB and 2000 + i with 300 MiB.
 * Index and number are the same unless FAKE_NVML_SEEN says otherwise.
 *
 *   FAKE_NVML_GPUS=N          number of GPUs (default 4)
 *   FAKE_NVML_SEEN=i,j,..     the GPUs that this process may see, in NVML's order
 *   FAKE_NVML_BROKEN=1        nvmlInit fails: the driver is not loaded
 *   FAKE_NVML_INIT=c          nvmlInit fails with code c, 18 where driver and library do not match
 *   FAKE_NVML_CRASH=1         nvmlInit crashes
 *   FAKE_NVML_HANG=1          nvmlInit never returns
 *   FAKE_NVML_NVLINK=n        n active NVLinks between the GPUs, one less on the last; PCIe alone without
 *   FAKE_NVML_LOST=i:n        GPU i is lost after n readings of its utilisation
 *   FAKE_NVML_XID=i:n:x       GPU i has a critical error x after n readings of its utilisation
 *   FAKE_NVML_MIG=i:n         GPU i is split into n MIG instances, of which memory and activity can be read
 *   FAKE_NVML_USED=i:n        n MiB of the memory of GPU i are used, with what the driver keeps
 *   FAKE_NVML_TOTAL=i:n       GPU i has n MiB of memory; with 0 none of it is used
 *   FAKE_NVML_THROTTLE=i:m    the bits m hold the clocks of GPU i down
 *   FAKE_NVML_GPM=0           GPUs before Hopper: no activity, traffic by counters
 *   FAKE_NVML_COUNTERS=0      and by no counters but the traffic of a moment: 100 i + 30 received, + 40 sent
 *   FAKE_NVML_ERROR=f:i:c,..  function f answers code c for GPU i
 *   FAKE_NVML_SLOW=f:ms       function f takes that long
 *
 * Compiled with -DOLD_DRIVER it has the functions of driver 470 alone. fake_calls(f) is how often f was called.
 */
#define _POSIX_C_SOURCE 200809L
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, TIMEOUT = 10, LOST = 15 };
enum { MAX_GPUS = 64, MAX_MIG = 8, MAX_FUNCTIONS = 64 };
enum { XID_EVENT = 8, UNSIGNED_LONG_LONG = 3 };

typedef struct Device {
    int gpu;
    int slot; /* -1: the whole GPU */
    int readings;
    int watched;
    int told;
} Device;

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int instance, compute; } Process;
typedef struct { Device *device; unsigned long long type, data; unsigned int instance, compute; } Event;
typedef struct { unsigned int field, scope; long long timestamp, latency; int type, code;
                 union { double d; unsigned long long ull; } value; } Field;
typedef struct { Device *device; double taken_s; } Sample;
typedef struct { unsigned int id; int code; double value; const char *names[3]; } Metric;
typedef struct { unsigned int version, count; Sample *before, *now; Metric metrics[]; } Metrics;

static Device devices[MAX_GPUS][1 + MAX_MIG];
static struct { const char *name; int calls; } functions[MAX_FUNCTIONS];

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

/* The n of "i:n" for GPU i, else -1. */
static int number_for(const char *name, int gpu) {
    const char *text = getenv(name), *colon = text ? strchr(text, ':') : NULL;
    return colon && atoi(text) == gpu ? atoi(colon + 1) : -1;
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int *calls_of(const char *function) {
    int i = 0;
    while (i < MAX_FUNCTIONS - 1 && functions[i].name && strcmp(functions[i].name, function)) i++;
    if (!functions[i].name) functions[i].name = strdup(function);
    return &functions[i].calls;
}

int fake_calls(const char *function) { return *calls_of(function); }

static int lost(const Device *device) {
    int after = number_for("FAKE_NVML_LOST", device->gpu);
    return after >= 0 && devices[device->gpu][0].readings >= after;
}

/* The code that FAKE_NVML_ERROR has for a function and a GPU, else OK. */
static int error_of(const char *function, int of_gpu) {
    size_t length = strlen(function);
    const char *error = getenv("FAKE_NVML_ERROR");
    for (; error; error = strchr(error, ',') ? strchr(error, ',') + 1 : NULL) {
        int gpu, code;
        if (!strncmp(error, function, length) && sscanf(error + length, ":%d:%d", &gpu, &code) == 2
            && gpu == of_gpu)
            return code;
    }
    return OK;
}

/* What every question about a GPU begins with: counts it, takes its time, and gives the code of its failure. */
static int enter(const char *function, const Device *device) {
    const char *slow = getenv("FAKE_NVML_SLOW");
    size_t length = strlen(function);
    ++*calls_of(function);
    if (slow && !strncmp(slow, function, length) && slow[length] == ':') {
        long ms = atol(slow + length + 1);
        struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    int code = error_of(function, device->gpu);
    if (code) return code;
    return lost(device) ? LOST : OK;
}

#define ENTER(device) do { int code_ = enter(__func__, device); if (code_) return code_; } while (0)
#define OF_WHOLE_GPUS(device) do { if ((device)->slot >= 0) return NOT_SUPPORTED; } while (0)

/* The number of the GPU that NVML calls `index`, -1 for none. */
static int gpu_at(int index) {
    const char *seen = getenv("FAKE_NVML_SEEN");
    if (!seen) return index < number("FAKE_NVML_GPUS", 4) ? index : -1;
    for (; seen && index; index--) seen = strchr(seen, ',') ? strchr(seen, ',') + 1 : NULL;
    return seen && *seen ? atoi(seen) : -1;
}

static int instances(int gpu) {
    int n = number_for("FAKE_NVML_MIG", gpu);
    return n < 0 ? 0 : n;
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
    return number("FAKE_NVML_BROKEN", 0) ? DRIVER_NOT_LOADED : number("FAKE_NVML_INIT", OK);
}

int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) {
    static char text[32];
    snprintf(text, sizeof text, "error %d", code);
    return text;
}

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
    *active = gpu_at(device->gpu + 1) >= 0 || (int)link < links - 1;
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned int *n) {
    for (*n = 0; gpu_at((int)*n) >= 0;) ++*n;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    int gpu = gpu_at((int)index);
    if (gpu < 0) return INVALID_ARGUMENT;
    *device = device_at(gpu, -1);
    return error_of(__func__, gpu);
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *n) {
    if (device->slot >= 0 || !instances(device->gpu)) return NOT_SUPPORTED;
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

int nvmlDeviceGetGpuInstanceId(Device *device, unsigned int *id) {
    if (device->slot < 0) return INVALID_ARGUMENT;
    *id = 7 + (unsigned int)device->slot;
    return OK;
}

int nvmlDeviceGetIndex(Device *device, unsigned int *index) {
    for (*index = 0; gpu_at((int)*index) >= 0; ++*index)
        if (gpu_at((int)*index) == device->gpu) return OK;
    return NOT_FOUND;
}

int nvmlDeviceGetMinorNumber(Device *device, unsigned int *minor) {
    OF_WHOLE_GPUS(device);
    *minor = (unsigned int)device->gpu;
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
    for (int index = 0, gpu; (gpu = gpu_at(index)) >= 0; index++)
        for (int slot = -1; slot < instances(gpu); slot++) {
            *device = device_at(gpu, slot);
            nvmlDeviceGetUUID(*device, text, sizeof text);
            if (strcmp(text, uuid) == 0) return OK;
            nvmlDeviceGetUUID(device_at(gpu, -1), text, sizeof text); /* as before driver 470 */
            snprintf(text + strlen(text), sizeof text - strlen(text), "/%d/0", 7 + slot);
            if (slot >= 0 && strncmp(uuid, "MIG-", 4) == 0 && strcmp(text, uuid + 4) == 0) return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, Device **device) {
    unsigned int domain, bus, slot;
    if (sscanf(bus_id, "%x:%x:%x.0", &domain, &bus, &slot) != 3) return INVALID_ARGUMENT;
    for (int index = 0, gpu; (gpu = gpu_at(index)) >= 0; index++)
        if (domain == 0 && slot == 0 && (int)bus == 16 + gpu) {
            *device = device_at(gpu, -1);
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned int length) {
    snprintf(text, length, device->slot < 0 ? "NVIDIA Fake %d" : "NVIDIA Fake %d MIG 1g.10gb", device->gpu);
    return OK;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    ENTER(device);
    memory->total = (device->slot < 0 ? 81920ull : 10240ull) << 20;
    int used = number_for("FAKE_NVML_USED", device->gpu), total = number_for("FAKE_NVML_TOTAL", device->gpu);
    memory->used = (unsigned long long)(used < 0 ? 1000 * device->gpu + 700 : used) << 20;
    if (total >= 0) memory->total = (unsigned long long)total << 20;
    if (!total) memory->used = 0;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *utilization) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    device->readings++;
    utilization->gpu = (unsigned int)(10 * device->gpu + 5);
    utilization->memory = (unsigned int)(2 * device->gpu + 1);
    return OK;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    *milliwatts = (unsigned int)(100000 * device->gpu + 50000);
    return OK;
}

int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned int *milliwatts) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    *milliwatts = 700000;
    return OK;
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned int *celsius) {
    if (sensor != 0) return INVALID_ARGUMENT;
    OF_WHOLE_GPUS(device);
    ENTER(device);
    *celsius = (unsigned int)(40 + device->gpu);
    return OK;
}

int nvmlDeviceGetClockInfo(Device *device, int clock, unsigned int *mhz) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    if (clock != 1 && clock != 2) return INVALID_ARGUMENT;
    *mhz = (unsigned int)((clock == 1 ? 1900 : 2600) + device->gpu);
    return OK;
}

static int throttle(const Device *device, unsigned long long *reasons) {
    int bits = number_for("FAKE_NVML_THROTTLE", device->gpu);
    *reasons = bits < 0 ? 1 : (unsigned long long)bits; /* else idle */
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    return throttle(device, reasons);
}

int nvmlDeviceGetTotalEccErrors(Device *device, int type, int counter, unsigned long long *errors) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    if (counter != 0) return INVALID_ARGUMENT;
    *errors = type == 0 ? (unsigned long long)device->gpu : 0;
    return OK;
}

int nvmlDeviceGetPcieThroughput(Device *device, int counter, unsigned int *kib_per_s) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    *kib_per_s = 1024u * (unsigned int)(100 * device->gpu + (counter == 1 ? 30 : 40));
    return OK;
}

/* Traffic in MiB/s, over PCIe or NVLink, received or sent. */
static double traffic(const Device *device, int nvlink, int received) {
    return (nvlink ? 10 : 1) * (100.0 * device->gpu + (received ? 10 : 20));
}

int nvmlDeviceGetFieldValues(Device *device, int count, Field *fields) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    for (int i = 0; i < count; i++) {
        unsigned int id = fields[i].field;
        int nvlink = id == 138 || id == 139, received = id == 139 || id == 198;
        int known = nvlink ? fields[i].scope == UINT_MAX : id == 197 || id == 198;
        double mib = traffic(device, nvlink, received) * now_s();
        fields[i].code = known && number("FAKE_NVML_COUNTERS", 1) ? OK : NOT_SUPPORTED;
        fields[i].type = UNSIGNED_LONG_LONG;
        fields[i].value.ull = (unsigned long long)(mib * (nvlink ? 1024 : 1048576));
    }
    return OK;
}

int nvmlEventSetCreate(int **set) {
    static int only;
    *set = &only;
    return OK;
}

int nvmlEventSetFree(int *set) {
    (void)set;
    return OK;
}

int nvmlDeviceGetSupportedEventTypes(Device *device, unsigned long long *types) {
    OF_WHOLE_GPUS(device);
    *types = XID_EVENT | 1;
    return OK;
}

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, int *set) {
    (void)set;
    OF_WHOLE_GPUS(device);
    if (types & ~(XID_EVENT | 1ull)) return INVALID_ARGUMENT;
    device->watched = (types & XID_EVENT) != 0;
    return OK;
}

int nvmlEventSetWait_v2(int *set, Event *event, unsigned int timeout_ms) {
    (void)set;
    (void)timeout_ms;
    const char *text = getenv("FAKE_NVML_XID");
    int gpu, after, xid;
    if (text && sscanf(text, "%d:%d:%d", &gpu, &after, &xid) == 3) {
        Device *device = device_at(gpu, -1);
        if (device->watched && !device->told && device->readings >= after) {
            *event = (Event){device, XID_EVENT, (unsigned long long)xid, UINT_MAX, UINT_MAX};
            device->told = 1;
            return OK;
        }
    }
    return TIMEOUT;
}

static int processes(const Device *device, unsigned int *count, Process *list) {
    unsigned int room = *count;
    *count = 2;
    if (room < 2 || !list) return INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < 2; i++)
        list[i] = (Process){1000 * (i + 1) + (unsigned int)device->gpu, (i ? 300ull : 700ull) << 20,
                            UINT_MAX, UINT_MAX};
    return OK;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    Memory all;
    if (memory->version != (sizeof(MemoryV2) | 2u << 24)) return INVALID_ARGUMENT;
    ENTER(device);
    int code = nvmlDeviceGetMemoryInfo(device, &all);
    memory->total = all.total;
    memory->reserved = 600ull << 20;
    if (!all.total) memory->reserved = 0;
    memory->used = all.used - memory->reserved;
    memory->free = all.free;
    return code;
}

int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *reasons) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    return throttle(device, reasons);
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, Process *list) {
    ENTER(device);
    return processes(device, count, list);
}

int nvmlGpmQueryDeviceSupport(Device *device, unsigned int *support) {
    if (device->slot >= 0 || support[0] != 1) return INVALID_ARGUMENT;
    support[1] = (unsigned int)number("FAKE_NVML_GPM", 1);
    return OK;
}

int nvmlGpmSampleAlloc(Sample **sample) {
    *sample = calloc(1, sizeof **sample);
    return OK;
}

int nvmlGpmSampleFree(Sample *sample) {
    ++*calls_of(__func__);
    free(sample);
    return OK;
}

int nvmlGpmSampleGet(Device *device, Sample *sample) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    *sample = (Sample){device, now_s()};
    return OK;
}

int nvmlGpmMigSampleGet(Device *device, unsigned int id, Sample *sample) {
    OF_WHOLE_GPUS(device);
    ENTER(device);
    if ((int)id < 7 || (int)id >= 7 + instances(device->gpu)) return INVALID_ARGUMENT;
    *sample = (Sample){device_at(device->gpu, (int)id - 7), now_s()};
    return OK;
}

int nvmlGpmMetricsGet(Metrics *request) {
    const Sample *before = request->before, *now = request->now;
    if (request->version != 1 || !before->device || before->device != now->device
        || before->taken_s >= now->taken_s)
        return INVALID_ARGUMENT;
    const Device *device = now->device;
    for (unsigned int i = 0; i < request->count; i++) {
        Metric *metric = &request->metrics[i];
        metric->code = OK;
        switch (metric->id) {
        case 2: metric->value = 3 * device->gpu + 1.5; break;
        case 5: metric->value = 2 * device->gpu + 0.25; break;
        case 20: metric->value = traffic(device, 0, 0); break;
        case 21: metric->value = traffic(device, 0, 1); break;
        case 60: metric->value = traffic(device, 1, 1); break;
        case 61: metric->value = traffic(device, 1, 0); break;
        default: metric->code = NOT_SUPPORTED;
        }
        if (device->slot >= 0 && metric->id >= 20) metric->code = NOT_SUPPORTED;
    }
    return OK;
}
#else
int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned int *count, Process *list) {
    ENTER(device);
    return processes(device, count, list);
}
#endif
