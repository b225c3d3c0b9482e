/* arm_features.h — what this processor can run beyond baseline aarch64, asked of the operating system. */
#ifndef CV_ARM_FEATURES_H
#define CV_ARM_FEATURES_H

#include <stdbool.h>

#if defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

typedef struct {
    bool dot;  /* FEAT_DotProd: sdot, udot (every Apple silicon Mac, Neoverse N1, Cortex-A76 and later) */
    bool i8mm; /* FEAT_I8MM: smmla, usmmla (Apple M2, Neoverse V1 and later) */
} cv_arm_features;

#if defined(__APPLE__)
static inline bool cv_arm_has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}
#endif

static inline cv_arm_features cv_arm_detect(void) {
    cv_arm_features f = {false, false};
#if defined(__APPLE__)
    f.dot = cv_arm_has("hw.optional.arm.FEAT_DotProd");
    f.i8mm = f.dot && cv_arm_has("hw.optional.arm.FEAT_I8MM");
#elif defined(__linux__)
    const unsigned long asimddp = 1ul << 20, i8mm = 1ul << 13; /* HWCAP_ASIMDDP, HWCAP2_I8MM of the kernel's interface */
    f.dot = (getauxval(AT_HWCAP) & asimddp) != 0;
    f.i8mm = f.dot && (getauxval(AT_HWCAP2) & i8mm) != 0;
#endif
    return f;
}

#endif
