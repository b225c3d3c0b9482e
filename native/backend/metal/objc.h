/* objc.h — libobjc and Metal through dlopen. The selectors that are used, looked up once. */
#ifndef CV_METAL_OBJC_H
#define CV_METAL_OBJC_H

#include "../../engine/error.h"

typedef void *id;
typedef void *SEL;
typedef unsigned long NSUInteger;
typedef struct {
    NSUInteger width, height, depth;
} MTLSize;

#define CV_METAL_SELECTORS(X)                                                                                                              \
    X(alloc, "alloc")                                                                                                                      \
    X(init, "init")                                                                                                                        \
    X(retain, "retain")                                                                                                                    \
    X(release, "release")                                                                                                                  \
    X(responds, "respondsToSelector:")                                                                                                     \
    X(string, "stringWithUTF8String:")                                                                                                     \
    X(utf8, "UTF8String")                                                                                                                  \
    X(description, "localizedDescription")                                                                                                 \
    X(name, "name")                                                                                                                        \
    X(new_queue, "newCommandQueue")                                                                                                        \
    X(working_set, "recommendedMaxWorkingSetSize")                                                                                         \
    X(max_buffer, "maxBufferLength")                                                                                                       \
    X(new_buffer, "newBufferWithLength:options:")                                                                                          \
    X(new_buffer_over, "newBufferWithBytesNoCopy:length:options:deallocator:")                                                             \
    X(contents, "contents")                                                                                                                \
    X(fast_math, "setFastMathEnabled:")                                                                                                    \
    X(new_library, "newLibraryWithSource:options:error:")                                                                                  \
    X(set_constant, "setConstantValue:type:atIndex:")                                                                                      \
    X(new_function, "newFunctionWithName:constantValues:error:")                                                                           \
    X(new_pipeline, "newComputePipelineStateWithFunction:error:")                                                                          \
    X(file_url, "fileURLWithPath:")                                                                                                        \
    X(set_url, "setUrl:")                                                                                                                  \
    X(new_archive, "newBinaryArchiveWithDescriptor:error:")                                                                                \
    X(set_function, "setComputeFunction:")                                                                                                 \
    X(array_of, "arrayWithObject:")                                                                                                        \
    X(set_archives, "setBinaryArchives:")                                                                                                  \
    X(new_pipeline_of, "newComputePipelineStateWithDescriptor:options:reflection:error:")                                                  \
    X(add_functions, "addComputePipelineFunctionsWithDescriptor:error:")                                                                   \
    X(serialize, "serializeToURL:error:")                                                                                                  \
    X(max_threads, "maxTotalThreadsPerThreadgroup")                                                                                        \
    X(new_residency, "newResidencySetWithDescriptor:error:")                                                                               \
    X(add_residency, "addResidencySet:")                                                                                                   \
    X(add_allocation, "addAllocation:")                                                                                                    \
    X(remove_allocation, "removeAllocation:")                                                                                              \
    X(request_residency, "requestResidency")                                                                                               \
    X(command_buffer, "commandBuffer")                                                                                                     \
    X(encoder, "computeCommandEncoder")                                                                                                    \
    X(set_pipeline, "setComputePipelineState:")                                                                                            \
    X(set_buffer, "setBuffer:offset:atIndex:")                                                                                             \
    X(set_bytes, "setBytes:length:atIndex:")                                                                                               \
    X(dispatch, "dispatchThreadgroups:threadsPerThreadgroup:")                                                                             \
    X(end_encoding, "endEncoding")                                                                                                         \
    X(new_event, "newSharedEvent")                                                                                                         \
    X(signal, "encodeSignalEvent:value:")                                                                                                  \
    X(wait_event, "encodeWaitForEvent:value:")                                                                                             \
    X(signaled, "signaledValue")                                                                                                           \
    X(set_signaled, "setSignaledValue:")                                                                                                           \
    X(commit, "commit")                                                                                                                    \
    X(wait, "waitUntilCompleted")                                                                                                          \
    X(status, "status")                                                                                                                    \
    X(error, "error")

typedef struct {
    void *libraries[4]; /* from dlopen */
    void *send;         /* objc_msgSend */
    id (*get_class)(const char *);
    SEL (*register_name)(const char *);
    void *(*pool_push)(void);
    void (*pool_pop)(void *);
    id (*create_device)(void);
    int (*sysctl)(const char *, void *, size_t *, void *, size_t); /* sysctlbyname; may be NULL */
#define CV_METAL_SELECTOR_FIELD(name, text) SEL name;
    struct { CV_METAL_SELECTORS(CV_METAL_SELECTOR_FIELD) } sel;
} cv_objc;

/* objc_msgSend must be called as a function of the method's exact type: CV_SEND(o, id, receiver, name, (types after SEL), …). */
#define CV_SEND(o, result, receiver, name, ...) CV_SEND_(o, result, receiver, name, __VA_ARGS__)
#define CV_SEND_(o, result, receiver, name, types, ...) (((result(*)(id, SEL CV_TYPES types))(uintptr_t)(o)->send)((id)(receiver), (o)->sel.name, __VA_ARGS__))
#define CV_SEND0(o, result, receiver, name) (((result(*)(id, SEL))(uintptr_t)(o)->send)((id)(receiver), (o)->sel.name))
#define CV_TYPES(...) , __VA_ARGS__

/* Loads the libraries, which then stay loaded: Metal has threads of its own. CARAVAN_METAL_LIBRARY names one that has everything instead of the system's: the test runtime. */
int cv_objc_open(cv_objc *o, cv_err err);

/* A system's setting as text ("kern.osproductversion"), "" when it is not there. */
void cv_objc_setting(const cv_objc *o, const char *name, char *out, size_t size);

#endif
